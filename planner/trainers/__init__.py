"""The files of other training programs, written from a configuration and read into one."""
