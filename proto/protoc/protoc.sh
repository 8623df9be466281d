#!/bin/sh
# PROTOC of build scripts (see .cargo/config.toml): builds the program beside it once, then runs it.
#
# The build has a target folder of its own, since the outer cargo holds the lock of the usual one, and
# none of the outer build's flags: sanitizers, clippy and other targets are not for a tool.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=$here/../../target/protoc
for variable in $(env | sed -n 's/^\(CARGO_[A-Z0-9_]*\|RUSTFLAGS\|RUSTC_WORKSPACE_WRAPPER\|RUSTDOCFLAGS\|TARGET\|HOST\|OUT_DIR\|PROFILE\|OPT_LEVEL\|DEBUG\)=.*/\1/p'); do
	# CARGO_HOME finds the registry; CARGO_NET_* and CARGO_HTTP_* say how it is reached; CARGO_MAKEFLAGS
	# shares the outer build's job slots.
	case $variable in
	CARGO_HOME | CARGO_NET_* | CARGO_HTTP_* | CARGO_REGISTRIES_* | CARGO_SOURCE_* | CARGO_MAKEFLAGS | CARGO_TERM_*) ;;
	*) unset "$variable" ;;
	esac
done
cargo=${CARGO:-cargo}
"$cargo" build --quiet --manifest-path "$here/Cargo.toml" --target-dir "$target"
exec "$target/debug/protoc" "$@"
