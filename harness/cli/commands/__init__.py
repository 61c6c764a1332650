"""The commands, a file each: nothing else names them.

The docstring of a file is the help of its command: a sentence, and examples. `PLACE` orders the list of commands: first
those that are used first. `arguments` adds what the command takes to its parser, and `run` gives the exit code. Its
options have two things more: ``error`` ends with a message about the arguments, ``parser`` is that of all commands.
"""
