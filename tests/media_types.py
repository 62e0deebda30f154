"""What Schemathesis has to be told: pieces of an upload are bytes like any others."""

import schemathesis

schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")
