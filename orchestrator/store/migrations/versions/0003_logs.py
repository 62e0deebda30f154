"""Logs over the records, signed checkpoints of them, and payloads under keys."""

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    if op.get_bind().scalar(sa.text("SELECT count(*) FROM queries")):
        # Records name the one before by its hash: there is no way to give old ones a place in a log.
        raise CommandError("its journal was written before there were logs; move it away, and begin anew")
    op.drop_table("records")
    op.drop_table("payloads")
    op.create_table(
        "records",
        sa.Column("query", sa.String(80), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("log", sa.String(80), nullable=False),
        sa.Column("leaf", sa.BigInteger, nullable=False),
        sa.Column("mac", sa.LargeBinary, nullable=False),
    )
    op.create_index("records_by_leaf", "records", ["log", "leaf"], unique=True)
    op.create_table(
        "payloads",
        sa.Column("query", sa.String(40), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "tiles",
        sa.Column("log", sa.String(80), primary_key=True),
        sa.Column("level", sa.Integer, primary_key=True),
        sa.Column("n", sa.BigInteger, primary_key=True),
        sa.Column("root", sa.LargeBinary, nullable=False),
        sa.Column("hashes", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "checkpoints",
        sa.Column("log", sa.String(80), primary_key=True),
        sa.Column("size", sa.BigInteger, primary_key=True),
        sa.Column("note", sa.Text, nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(80), primary_key=True),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.Column("public", sa.Text),
    )
