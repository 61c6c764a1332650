"""Where and how runs execute: which are to be made, each in a process of its own, and what is said meanwhile."""
