import { runCases } from "../helpers/run-cases.js";

runCases("gradient");
