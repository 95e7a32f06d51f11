#!/bin/sh
# Fetches the libraries again with npm, in the versions below, and writes SHA256SUMS.
set -eu
cd "$(dirname "$0")"

take() { # PACKAGE VERSION FILE NAME: takes FILE as NAME.js, and the licence as NAME.LICENSE
    work=$(mktemp -d)
    npm pack --silent --pack-destination "$work" "$1@$2" >/dev/null
    tar -xzf "$work"/*.tgz -C "$work" --strip-components=1
    cp "$work/$3" "$4.js"
    cp "$work/LICENSE" "$4.LICENSE"
    chmod 644 "$4.js" "$4.LICENSE"
    rm -r "$work"
}

also() { # NAME PACKAGE VERSION: NAME.js holds code of PACKAGE as well, whose licence is added
    work=$(mktemp -d)
    npm pack --silent --pack-destination "$work" "$2@$3" >/dev/null
    tar -xzf "$work"/*.tgz -C "$work" --strip-components=1
    { printf '\n\n%s %s:\n\n' "$2" "$3" && cat "$work"/LICENSE*; } >>"$1.LICENSE"
    rm -r "$work"
}

take markdown-it 15.0.3 dist/browser/markdown-it.esm.min.mjs markdown-it
also markdown-it entities 8.1.0
also markdown-it linkify-it 6.1.0
also markdown-it mdurl 2.1.0
also markdown-it punycode.js 2.3.1
also markdown-it uc.micro 3.0.0
take dompurify 3.5.0 dist/purify.min.js purify
take @highlightjs/cdn-assets 11.12.0 es/highlight.min.js highlight
sha256sum -- *.js *.LICENSE >SHA256SUMS
