"""The same small jobs by fastmorph, by textbook code and by a growth library: time, and what each preserved."""
