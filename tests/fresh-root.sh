#!/bin/bash
# `make test-fresh`: runs `make demo` where a newcomer would, in a minimal Debian that has only what README.md names.
#
#   SUITE    Debian's release: bookworm (default), trixie
#   COMMAND  what is run in the checkout: `make demo` (default), for example `make demo test`
#
#   target/fresh-root/SUITE   the bare root by debootstrap, made once
#   a copy of it              git, make, ca-certificates; the checkout in /root (mode 0700), nothing built
#   this machine's Rust       toolchain and cargo's registry, mounted; no other package of this machine
#
# What `make setup` installs goes into the copy, which is deleted at the end: a package that this machine
# has cannot hide one that the setup forgets.
set -euo pipefail
cd "$(dirname "$0")/.."

suite=${SUITE:-bookworm}
command=${COMMAND:-make demo}

if [ "$(id -u)" != 0 ]; then
	echo "SKIPPED: a root of its own needs root" >&2
	exit 0
fi
if ! command -v debootstrap >/dev/null; then
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap >/dev/null
fi

cache=$PWD/target/fresh-root
bare=$cache/$suite
if [ ! -d "$bare" ]; then
	mkdir -p "$cache"
	echo "fresh-root: making $bare with debootstrap"
	rm -rf "$bare.part"
	if ! debootstrap --variant=minbase --include=ca-certificates,git,make "$suite" "$bare.part" >"$cache/debootstrap.log" 2>&1; then
		tail -n 20 "$cache/debootstrap.log" >&2
		echo "fresh-root: debootstrap $suite failed; all it said is in $cache/debootstrap.log" >&2
		exit 1
	fi
	mv "$bare.part" "$bare"
fi

root=$(mktemp -d "$cache/run.XXXXXX")
trap 'rm -rf --one-file-system "$root"' EXIT
cp -a "$bare/." "$root"
cp --remove-destination /etc/resolv.conf /etc/hosts "$root/etc/"

# What git tracks or would track, as it is now; nothing that was built.
mkdir -p "$root/root/carport"
chmod 0700 "$root/root"
git ls-files -z --cached --others --exclude-standard | xargs -0 -r ls -d 2>/dev/null | tar -c -T - | tar -x -C "$root/root/carport"
git -C "$root/root/carport" init -q

# Certificates and proxies that this machine's network asks for, where it has some of its own.
network=()
for variable in SSL_CERT_FILE CURL_CA_BUNDLE CARGO_HTTP_CAINFO GIT_SSL_CAINFO; do
	file=${!variable:-}
	[ -f "$file" ] || continue
	cp "$file" "$root/etc/ssl/certs/this-machine.pem"
	network+=("$variable=/etc/ssl/certs/this-machine.pem")
done
for variable in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
	[ -z "${!variable:-}" ] || network+=("$variable=${!variable}")
done

cargo_home=${CARGO_HOME:-$HOME/.cargo}
mkdir -p "$root/opt/rust" "$root/opt/cargo/registry" "$cargo_home/registry"
[ ! -e "$cargo_home/config.toml" ] || cp "$cargo_home/config.toml" "$root/opt/cargo/"

echo "fresh-root: $command in a bare $suite, with $(cargo --version)"
start=$SECONDS
# A mount namespace whose root it is, as on a machine: mounts go with the last process.
ROOT=$root RUST=$(rustc --print sysroot) REGISTRY=$cargo_home/registry COMMAND=$command \
	unshare --mount --propagation private bash -euc '
	mount --bind "$ROOT" "$ROOT"
	mount --bind "$RUST" "$ROOT/opt/rust"
	mount -o remount,bind,ro "$ROOT/opt/rust"
	mount --bind "$REGISTRY" "$ROOT/opt/cargo/registry"
	mount -t proc proc "$ROOT/proc"
	mount --rbind /sys "$ROOT/sys"
	mount --rbind /dev "$ROOT/dev"
	cd "$ROOT"
	pivot_root . mnt
	exec env -i HOME=/root TERM=dumb LANG=C.UTF-8 CARGO_HOME=/opt/cargo "$@" \
		PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
		bash -c "umount -l /mnt && cd /root/carport && $COMMAND"
	' bash "${network[@]}"
echo "fresh-root: passed in $((SECONDS - start)) s"
