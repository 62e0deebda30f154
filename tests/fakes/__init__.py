"""Fakes of what is not ours: they speak the real protocol over a real socket."""
