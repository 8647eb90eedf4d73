"""What other compiled modules use to refuse, without asking Python."""

from tokenguard.model cimport Answer

cpdef Answer refuse(refused, double jitter)
