"""The figures of Airlock, each beside a floor or a peer measured in the same interleaved run: `make bench`."""
