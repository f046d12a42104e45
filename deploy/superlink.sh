#!/bin/sh
# The server's side: a SuperLink with TLS that admits registered SuperNodes only.
#
#   superlink.sh CREDENTIALS STATE [HOST [PORT]]
#
# CREDENTIALS holds ca.crt, server.crt and server.key. STATE is a folder for its database, which outlives a restart.
# HOST (default 127.0.0.1) and PORT (8443) are where it listens: read "Who may reach the port" in deploy/README.md first.
set -eu
umask 077 # what a run leaves, and the database, is this user's alone
[ "$#" -ge 2 ] || {
    echo "superlink.sh: error: usage: superlink.sh CREDENTIALS STATE [HOST [PORT]]" >&2
    exit 2
}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
credentials=$(CDPATH='' cd -- "$1" && pwd)
mkdir -p "$2"
cd "$2" # what an app writes to a relative path lands here
PATH=$here/../.venv/bin:$PATH
export PATH FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE-1}" PYTHONUNBUFFERED=1
exec python -P "$here/patient.py" flower-superlink --ssl-ca-certfile "$credentials/ca.crt" \
    --ssl-certfile "$credentials/server.crt" --ssl-keyfile "$credentials/server.key" \
    --enable-supernode-auth --disable-runtime-dependency-installation \
    --database "$PWD/state.db" --host "${3:-127.0.0.1}" --port "${4:-8443}"
