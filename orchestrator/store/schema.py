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
    sa.Column("status", sa.String(16), nullable=False),  # queued, open, interrupted, or how it was closed
    sa.Index("queries_by_status", "status", "tenant"),
    sa.Index("queries_by_tenant", "tenant", "opened_at", "id"),
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

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("policy", sa.Text),  # JSON; None: the platform's alone
    sa.Column("issuer", sa.Text),  # JSON: whose tokens are taken for this tenant's, if anybody's
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("suspended_at", sa.String(32)),
)
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("label", sa.String(64), nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),  # of the secret, under the pepper; see store/registry.py
    sa.Column("scopes", sa.Text, nullable=False),  # JSON list
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("expires_at", sa.String(32)),
    sa.Column("revoked_at", sa.String(32)),
    sa.Column("used_at", sa.String(32)),
    sa.Index("api_keys_by_tenant", "tenant"),
)
requests = sa.Table(  # queries that came over HTTP
    "requests",
    metadata,
    sa.Column("query", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("asker", sa.String(128), nullable=False),  # id of a key, or who a token is of
    sa.Column("idempotency", sa.String(64)),  # SHA-256 of the Idempotency-Key
    sa.Column("fingerprint", sa.String(64), nullable=False),  # SHA-256 of what was asked
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("cancelled_at", sa.String(32)),  # somebody asked for its end
    sa.Index("requests_by_idempotency", "tenant", "idempotency", unique=True),
)
uploads = sa.Table(  # under way; how far they are, the file tells
    "uploads",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("encoding", sa.String(16), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("length", sa.BigInteger),
    sa.Column("context", sa.String(64)),  # what became of it
    sa.Column("at", sa.String(32), nullable=False),
    sa.Index("uploads_by_tenant", "tenant"),
)
contexts = sa.Table(  # who has given what: the store itself knows of no tenants
    "contexts",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("at", sa.String(32), nullable=False),
    sa.Index("contexts_by_bytes", "bytes", "id"),  # a removal asks for those of a size, with all who store waiting
)
