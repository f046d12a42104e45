#!/bin/sh
# Credentials of one federation: its own certificate authority, the server's certificate, and a key for each SuperNode.
#
#   credentials.sh ca DIR               once, on a machine that you trust: DIR/ca.crt (for everybody), DIR/ca.key (secret)
#   credentials.sh server DIR NAME...   DIR/server.crt and DIR/server.key (secret); NAMEs are all host names and addresses
#                                       by which SuperNodes and operators reach the server
#   credentials.sh node DIR NAME        DIR/NAME (secret) and DIR/NAME.pub; at the client, whose secret never leaves it
#
# Needs openssl and ssh-keygen. Never overwrites a file; a try that fails or is interrupted leaves nothing.
set -eu
umask 077

fail() {
    echo "credentials.sh: error: $*" >&2
    exit 2
}

# Everything is made in a folder of its own and moved once it is whole.
clean_up() {
    [ -z "$new" ] || rm -rf "$new"
    [ -z "$half" ] || rm -f "$half"
    [ -z "$made" ] || rmdir "$dir" 2>/dev/null || true
}

absent() {
    for file in "$@"; do
        [ ! -e "$file" ] || fail "$file is there already; move it away to make a new one"
    done
}

ca() {
    absent "$dir/ca.key" "$dir/ca.crt"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 3650 -subj "/CN=fedmitr CA" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout "$new/ca.key" -out "$new/ca.crt" 2>"$new/log" ||
        fail "$(tr '\n' ' ' <"$new/log")"
    chmod 644 "$new/ca.crt"
    keep ca.key ca.crt
}

server() {
    [ "$#" -gt 0 ] || fail "give the names and addresses of the server, such as fl.example.org 203.0.113.7"
    [ -e "$dir/ca.key" ] || fail "there is no $dir/ca.key; run: credentials.sh ca $dir"
    absent "$dir/server.key" "$dir/server.crt"
    names="DNS:localhost,IP:127.0.0.1" # the SuperLink's own helpers come this way
    for name in "$@"; do
        case "$name" in
        localhost | 127.0.0.1) ;;
        *:*) names="$names,IP:$name" ;;
        *[!0-9.]*) names="$names,DNS:$name" ;;
        *) names="$names,IP:$name" ;;
        esac
    done
    {
        echo "basicConstraints=critical,CA:FALSE"
        echo "keyUsage=critical,digitalSignature"
        echo "extendedKeyUsage=serverAuth"
        echo "subjectKeyIdentifier=hash"
        echo "authorityKeyIdentifier=keyid"
        echo "subjectAltName=$names"
    } >"$new/server.ext"
    {
        openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=fedmitr server" \
            -keyout "$new/server.key" -out "$new/server.csr" &&
            openssl x509 -req -in "$new/server.csr" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -sha384 \
                -set_serial "0x$(openssl rand -hex 16)" -days 825 -extfile "$new/server.ext" -out "$new/server.crt"
    } 2>"$new/log" || fail "$(tr '\n' ' ' <"$new/log")"
    chmod 644 "$new/server.crt"
    keep server.key server.crt
}

node() {
    [ "$#" -eq 1 ] || fail "give one name, such as hospital-a"
    case "$1" in
    "" | .* | -* | */* | *\"* | *\\* | *\|*) fail "'$1' cannot be a client's name; use letters, digits, - and _" ;;
    esac
    absent "$dir/$1" "$dir/$1.pub"
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "$1" -f "$new/$1" </dev/null 2>"$new/.log" ||
        fail "ssh-keygen made no key in $dir: $(tr '\n' ' ' <"$new/.log")"
    keep "$1" "$1.pub"
}

keep() {
    half=$dir/$1 # without its other half it would block the next try
    mv "$new/$1" "$dir/$1" || fail "cannot write $dir/$1"
    mv "$new/$2" "$dir/$2" || fail "cannot write $dir/$2"
    half=''
}

[ "$#" -ge 2 ] || fail "usage: credentials.sh ca DIR | server DIR NAME... | node DIR NAME"
what=$1
dir=$2
shift 2
case "$what" in
ca | server | node) ;;
*) fail "'$what' is none of: ca, server, node" ;;
esac
new=''
made=''
half=''
trap clean_up EXIT
trap 'exit 130' INT TERM HUP
[ -d "$dir" ] || made=yes
mkdir -p "$dir" 2>/dev/null || fail "cannot make the folder $dir"
new=$(mktemp -d "$dir/.new.XXXXXX" 2>/dev/null) || fail "cannot write to the folder $dir"
"$what" "$@"
