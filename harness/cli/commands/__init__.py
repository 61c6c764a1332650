"""The commands: one file each, which says what the command takes, shows examples and carries it out.

A file that is put here is a command; nothing else names it.
"""
