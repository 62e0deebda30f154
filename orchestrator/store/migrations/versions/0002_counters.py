"""Counters beside the money of a scope; what a reservation took of them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def upgrade() -> None:
    postgresql = op.get_bind().dialect.name == "postgresql"
    with op.batch_alter_table("scopes") as scopes:
        for name in ("spent", "held"):
            scopes.alter_column(name, server_default="0", existing_type=sa.BigInteger, existing_nullable=False)
        for name in ("calls", "tokens", "tokens_held", "in_flight", "children"):
            scopes.add_column(_count(name))
        if postgresql:
            scopes.alter_column("id", type_=sa.String(128, collation="C"), existing_type=sa.String(128))
    with op.batch_alter_table("reservations") as reservations:
        reservations.add_column(_count("tokens"))
        reservations.add_column(_count("calls"))
        reservations.alter_column("id", type_=sa.String(128), existing_type=sa.String(80))
        reservations.alter_column("scopes", type_=sa.Text, existing_type=sa.JSON, postgresql_using="scopes::text")
