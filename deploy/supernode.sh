#!/bin/sh
# One client's side: a SuperNode with the client's name, key and images.
#
#   supernode.sh CREDENTIALS SERVER:PORT NAME IMAGES [LOCAL_PORT]
#
# CREDENTIALS holds ca.crt and NAME, the key that `credentials.sh node` made. IMAGES is the folder of the client's images.
# LOCAL_PORT (default 9094) is on this machine's loopback only; several SuperNodes on one machine need one each.
# NODE_CONFIG may hold more of Flower's --node-config, such as: label-column="finding"
# SUPERNODE_OPTIONS may hold more options of flower-supernode, such as: --trusted-entities /etc/fedmitr/trusted.yaml
set -eu
umask 077 # what a run leaves, and the database, is this user's alone
fail() {
    echo "supernode.sh: error: $*" >&2
    exit 2
}
[ "$#" -ge 4 ] || fail "usage: supernode.sh CREDENTIALS SERVER:PORT NAME IMAGES [LOCAL_PORT]"
for file in ca.crt "$3"; do
    [ -r "$1/$file" ] || fail "cannot read $1/$file; put it there, or let this user read it"
done
[ -d "$4" ] || fail "there is no folder $4 of images"
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
credentials=$(CDPATH='' cd -- "$1" && pwd)
images=$(CDPATH='' cd -- "$4" && pwd)
PATH=$here/../.venv/bin:$PATH
export PATH FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE-1}" PYTHONUNBUFFERED=1
# shellcheck disable=SC2086 # several options are several words
exec flower-supernode ${SUPERNODE_OPTIONS-} --root-certificates "$credentials/ca.crt" --superlink "$2" --port "${5:-9094}" \
    --auth-supernode-private-key "$credentials/$3" \
    --node-config "client-name=\"$3\" data-path=\"$images\" ${NODE_CONFIG-}"
