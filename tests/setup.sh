#!/bin/sh
# `make setup`: installs what build, demo and tests need beside git and make.
#
# On Debian and Ubuntu each package is asked for by name: that a program is found says nothing about the
# packages that it only recommends. Elsewhere programs are looked for, and the missing ones are named.
set -eu

cd "$(dirname "$0")/.."
RUST=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
[ -n "$RUST" ] || { echo "setup: Cargo.toml names no rust-version" >&2; exit 1; }
PACKAGES="build-essential busybox-static ca-certificates curl docker-registry fuse3 openssl procps python3 python3-venv skopeo strace util-linux zstd"
PROGRAMS="busybox cc curl docker-registry fusermount3 openssl ps python3 skopeo strace unshare zstd"

fail() {
	echo "setup: $*" >&2
	exit 1
}

packages() {
	if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
		missing=
		for package in $PACKAGES; do
			state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
			[ "$state" = installed ] || missing="$missing $package"
		done
		[ -n "$missing" ] || return 0
		[ "$(id -u)" = 0 ] || fail "missing packages:$missing; run 'sudo make setup' once"
		echo "setup: installing$missing"
		export DEBIAN_FRONTEND=noninteractive
		apt-get update -qq
		# shellcheck disable=SC2086
		apt-get install -y -qq --no-install-recommends $missing >/dev/null
		return 0
	fi
	missing=
	for program in $PROGRAMS; do
		command -v "$program" >/dev/null || missing="$missing $program"
	done
	[ -z "$missing" ] || fail "missing programs:$missing; install them with your system's package manager"
}

# Whether this cargo is RUST or newer.
new_enough() {
	version=$("$1" --version 2>/dev/null | cut -d' ' -f2) || return 1
	[ -n "$version" ] || return 1
	[ "$(printf '%s\n%s\n' "$RUST" "$version" | sort -V | head -n 1)" = "$RUST" ]
}

rust() {
	cargo=${CARGO:-cargo}
	new_enough "$cargo" && return 0
	by_hand="install Rust $RUST or newer by hand (https://forge.rust-lang.org/infra/other-installation-methods.html), or name a mirror in RUSTUP_DIST_SERVER and RUSTUP_UPDATE_ROOT"
	if command -v rustup >/dev/null; then
		echo "setup: $("$cargo" --version 2>/dev/null || echo no cargo) is older than $RUST: running 'rustup update stable'"
		rustup update stable || fail "rustup cannot update: $by_hand"
	else
		echo "setup: no cargo $RUST or newer: installing Rust for this user with rustup's installer, from https://sh.rustup.rs"
		installer=$(mktemp)
		curl --proto '=https' --tlsv1.2 --silent --show-error --fail --max-time 120 \
			--output "$installer" https://sh.rustup.rs || fail "https://sh.rustup.rs cannot be reached: $by_hand"
		sh "$installer" -y --quiet --profile minimal --component clippy --component rustfmt ||
			fail "rustup's installer failed: $by_hand"
		rm -f "$installer"
	fi
	PATH=$HOME/.cargo/bin:$PATH
	new_enough cargo || fail "cargo is still older than $RUST: $(command -v cargo); put \$HOME/.cargo/bin first in PATH, or run 'rustup default stable'"
}

packages
rust
