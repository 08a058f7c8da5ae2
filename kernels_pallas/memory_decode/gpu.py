"""tmp"""
def unsupported(*a, **k): return "tmp"
def memory_decode(*a, **k): raise
