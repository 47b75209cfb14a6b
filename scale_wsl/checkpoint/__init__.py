"""The logical checkpoint: one format, written by every engine and read by every engine."""
