"""What other compiled modules use of the fields without asking Python."""

from tokenguard._bucket cimport Outcome

cpdef list limit_headers(tuple groups, Outcome outcome)
cpdef bytes limit_lines(tuple groups, Outcome outcome)
