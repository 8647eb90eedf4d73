"""Reading a request without asking Python."""

from tokenguard.providers._chat cimport ChatRequest, scan_chat

cpdef ChatRequest read_chat(raw)
