"""What a run came from: the code that decides its numbers, the machine and its clock."""
