"""Everything that runs inside a sandbox. Standard library only, Python 3.9+, shipped as one `guest.pyz`.

The host imports `wire` (the frames) and the pure rule on the context's form; nothing else of this package.
"""
