"""The words and rules of the service: pure functions and frozen records, no I/O, no clock, no logging."""
