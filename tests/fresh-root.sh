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

if [ "${INSIDE:-}" != 1 ]; then
	if [ "$(id -u)" != 0 ]; then
		echo "SKIPPED: a root of its own needs root" >&2
		exit 0
	fi
	if ! command -v debootstrap >/dev/null; then
		apt-get update -qq
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap >/dev/null
	fi
	# A mount namespace of its own: every mount below goes with the last process.
	INSIDE=1 exec unshare --mount --propagation private "$0"
fi

cache=target/fresh-root
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

root=$(mktemp -d "$PWD/$cache/run.XXXXXX")
# Detached mounts would hold the copy's files until the namespace ends.
trap 'mount -l | awk -v root="$root/" "index(\$3, root) == 1 {print \$3}" | sort -r | xargs -r -n 1 umount -l; rm -rf --one-file-system "$root"' EXIT
cp -a "$bare/." "$root"

mkdir -p "$root/root/carport"
chmod 0700 "$root/root"
# What git tracks or would track, as it is now; nothing that was built.
git ls-files -z --cached --others --exclude-standard | xargs -0 -r ls -d 2>/dev/null | tar -c -T - | tar -x -C "$root/root/carport"
git -C "$root/root/carport" init -q

mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
cp --remove-destination /etc/resolv.conf "$root/etc/resolv.conf"
cp --remove-destination /etc/hosts "$root/etc/hosts"

cargo=$(command -v cargo)
rustc=$(rustc --print sysroot)
mkdir -p "$root/opt/rust" "$root/opt/cargo/registry"
mount --bind "$rustc" "$root/opt/rust"
mount -o remount,bind,ro "$root/opt/rust"
cargo_home=${CARGO_HOME:-$HOME/.cargo}
mkdir -p "$cargo_home/registry"
mount --bind "$cargo_home/registry" "$root/opt/cargo/registry"
[ ! -e "$cargo_home/config.toml" ] || cp "$cargo_home/config.toml" "$root/opt/cargo/"

# Certificates that this machine's network asks for, where it has some of its own.
certificates=()
for variable in SSL_CERT_FILE CURL_CA_BUNDLE CARGO_HTTP_CAINFO GIT_SSL_CAINFO; do
	file=${!variable:-}
	[ -f "$file" ] || continue
	cp "$file" "$root/etc/ssl/certs/this-machine.pem"
	certificates+=("$variable=/etc/ssl/certs/this-machine.pem")
done
proxies=()
for variable in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
	[ -z "${!variable:-}" ] || proxies+=("$variable=${!variable}")
done

echo "fresh-root: $command in a bare $suite, with $("$cargo" --version)"
start=$SECONDS
env -i HOME=/root TERM=dumb LANG=C.UTF-8 CARGO_HOME=/opt/cargo \
	PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	"${certificates[@]}" "${proxies[@]}" \
	chroot "$root" /bin/bash -c "cd /root/carport && $command"
echo "fresh-root: passed in $((SECONDS - start)) s"
