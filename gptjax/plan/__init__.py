"""Planning: the memory, time and communication of a run, estimated before it is started."""
