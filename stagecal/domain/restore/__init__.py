"""From what the archive keeps of a MOUS to how it is restored: what is known, who says what, what is to be done.

No I/O and no clock in here: files are texts that somebody else has read.
"""
