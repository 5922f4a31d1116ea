"""The commands of `train.py`, one file each: the arguments it takes and what it does."""
