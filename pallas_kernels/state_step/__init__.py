"""One token of a recurrence whose state is a matrix: the state is read and written once, in place."""
