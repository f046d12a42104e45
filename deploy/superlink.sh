#!/bin/sh
# The server's side: a SuperLink with TLS that admits registered SuperNodes only.
#
#   superlink.sh CREDENTIALS STATE [HOST [PORT]]
#
# CREDENTIALS holds ca.crt, server.crt and server.key. STATE is a folder for its database, which outlives a restart.
# HOST (default 127.0.0.1) and PORT (8443) are where it listens: read "Who may reach the port" in deploy/README.md first.
set -eu
umask 077 # what a run leaves, and the database, is this user's alone
fail() {
    echo "superlink.sh: error: $*" >&2
    exit 2
}
[ "$#" -ge 2 ] || fail "usage: superlink.sh CREDENTIALS STATE [HOST [PORT]]"
for file in ca.crt server.crt server.key; do
    [ -r "$1/$file" ] || fail "cannot read $1/$file; make it by credentials.sh, or let this user read it"
done
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
credentials=$(CDPATH='' cd -- "$1" && pwd)
mkdir -p "$2" 2>/dev/null || fail "cannot make the folder $2"
cd "$2" # what an app writes to a relative path lands here
chmod go-rwx . state.db* 2>/dev/null || true # of an earlier version
PATH=$here/../.venv/bin:$PATH
export PATH FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE-1}" PYTHONUNBUFFERED=1
exec python -P "$here/patient.py" flower-superlink --ssl-ca-certfile "$credentials/ca.crt" \
    --ssl-certfile "$credentials/server.crt" --ssl-keyfile "$credentials/server.key" \
    --enable-supernode-auth --disable-runtime-dependency-installation \
    --database "$PWD/state.db" --host "${3:-127.0.0.1}" --port "${4:-8443}"
