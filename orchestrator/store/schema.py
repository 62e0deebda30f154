"""The tables, as the code has them; `migrations/` is how a database gets there, and a test holds both together."""

from __future__ import annotations

import sqlalchemy as sa

# Ids are compared byte by byte on every database: what lies between two of them must not depend on a language.
_SCOPE_ID = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")

metadata = sa.MetaData()
queries = sa.Table(
    "queries",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("owner", sa.String(40), nullable=False),
    sa.Column("policy", sa.String(64), nullable=False),
    sa.Column("opened_at", sa.String(32), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),  # open, interrupted, or how it was closed
    sa.Index("queries_by_status", "status", "tenant"),
)
records = sa.Table(
    "records",
    metadata,
    sa.Column("query", sa.String(80), primary_key=True),  # the chain: a query's id, or for a log's own the log's
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("record", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("log", sa.String(80), nullable=False),
    sa.Column("leaf", sa.BigInteger, nullable=False),  # which entry of its log it is, from 0 on
    sa.Column("mac", sa.LargeBinary, nullable=False),  # that an Airlock with the master key wrote it
    sa.Index("records_by_leaf", "log", "leaf", unique=True),
)
payloads = sa.Table(
    "payloads",
    metadata,
    sa.Column("query", sa.String(40), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("sealed", sa.LargeBinary, nullable=False),  # see store/vault.py
)
tiles = sa.Table(  # whole ones
    "tiles",
    metadata,
    sa.Column("log", sa.String(80), primary_key=True),
    sa.Column("level", sa.Integer, primary_key=True),
    sa.Column("n", sa.BigInteger, primary_key=True),
    sa.Column("root", sa.LargeBinary, nullable=False),
    sa.Column("hashes", sa.LargeBinary, nullable=False),
)
checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("log", sa.String(80), primary_key=True),
    sa.Column("size", sa.BigInteger, primary_key=True),
    sa.Column("note", sa.Text, nullable=False),
)
keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(80), primary_key=True),  # signer, or a tenant's log
    sa.Column("sealed", sa.LargeBinary, nullable=False),  # under the master key
    sa.Column("public", sa.Text),  # the verifier's key, of the signer
)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


scopes = sa.Table(
    "scopes",
    metadata,
    sa.Column("id", _SCOPE_ID, primary_key=True),
    _count("spent"),  # nano-USD
    _count("held"),
    _count("calls"),  # ever made
    _count("tokens"),  # of calls that have ended
    _count("tokens_held"),  # the most that calls in flight can use
    _count("in_flight"),
    _count("children"),  # ever made
)
reservations = sa.Table(
    "reservations",
    metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("query", sa.String(40), nullable=False),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("amount", sa.BigInteger, nullable=False),
    _count("tokens"),
    _count("calls"),
    sa.Column("settled", sa.BigInteger),
    sa.Column("state", sa.String(8), nullable=False),  # open, settled, void
    sa.Column("scopes", sa.Text, nullable=False),  # JSON, as text: some drivers would decode it by themselves
    sa.Index("reservations_by_query", "query", "state"),
)
