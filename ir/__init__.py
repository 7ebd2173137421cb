"""The program and facts about it. Nothing here rewrites a program."""
