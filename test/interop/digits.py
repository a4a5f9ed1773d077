"""Writes scikit-learn's handwritten digits into the file that test/train reads: test/fixtures/digits.bin.gz.

Usage: python test/interop/digits.py [FILE]     (needs scikit-learn from PyPI)

1,797 records of 65 bytes: 64 pixels of an 8 x 8 image, row by row, 0 to 16, and the digit. They are the test set of "Optical Recognition
of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49), which the
repository licenses under CC BY 4.0, as scikit-learn (BSD-3-Clause) distributes it. The values are unchanged; only the format is another.
"""
import gzip
import pathlib
import sys

import numpy
from sklearn.datasets import load_digits

digits = load_digits()
records = numpy.concatenate([digits.data, digits.target[:, None]], axis=1)
packed = records.astype(numpy.uint8)
assert packed.shape == (1797, 65) and (packed == records).all() and packed[:, :64].max() == 16
default = pathlib.Path(__file__).parent.parent / "fixtures" / "digits.bin.gz"
# Without a time, so that the same data give the same file.
(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default).write_bytes(gzip.compress(packed.tobytes(), 9, mtime=0))
