#!/usr/bin/env bash
# Builds the programs of the test cluster (`make test-cluster`, `make cluster`) with Go, unmodified, from the
# modules beside this file: the versions are in their go.mod, the checksums in their go.sum.
#
#   build.sh FOLDER     the programs go to FOLDER
#
# A module is built again only when its go.mod, its go.sum, Go or this file changed: FOLDER/.MODULE.stamp holds
# what it was built from. The first build takes about ten minutes on two cores and 4 GB of Go's build cache; an
# unchanged second run takes well under a second.
#
# Exit code 77: this machine cannot build them (no Go). Every other failure is a failure.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
bin=${1:?usage: build.sh FOLDER}
mkdir -p "$bin"
bin=$(cd "$bin" && pwd)

if ! command -v go >/dev/null; then
	echo "cluster: Go is not installed: no test cluster can be built; install Go from https://go.dev/dl" >&2
	exit 77
fi

# runc needs libseccomp: the kubelet asks for a seccomp profile for every pod sandbox. busybox is what the pods run.
needed=
[ -e /usr/include/seccomp.h ] || needed="$needed libseccomp-dev"
[ -x /bin/busybox ] || needed="$needed busybox-static"
command -v ip >/dev/null || needed="$needed iproute2"
# Debian has it apart from util-linux, Ubuntu in it.
command -v fincore >/dev/null || needed="$needed util-linux-extra"
command -v cc >/dev/null || needed="$needed gcc libc6-dev"
if [ -n "$needed" ]; then
	if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
		echo "cluster: missing packages:$needed; install them (as root: apt-get install$needed)" >&2
		exit 1
	fi
	echo "cluster: installing$needed"
	export DEBIAN_FRONTEND=noninteractive
	{ apt-get install -y -qq --no-install-recommends $needed || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $needed; }; } >/dev/null
fi

static='-s -w'
# kubectl and the kubelet parse their own version, which the linker sets.
kubernetes_version=$(awk '$1 == "k8s.io/kubernetes" { print $2 }' "$here/kubernetes/go.mod")
[ -n "$kubernetes_version" ] || { echo "cluster: $here/kubernetes/go.mod does not require k8s.io/kubernetes" >&2; exit 1; }

build_kubernetes() {
	CGO_ENABLED=0 go build -trimpath -ldflags "$static -X k8s.io/component-base/version.gitVersion=$kubernetes_version" -o "$bin/" \
		k8s.io/kubernetes/cmd/{kubelet,kube-apiserver,kube-controller-manager,kube-scheduler,kubectl}
}

build_runtime() {
	CGO_ENABLED=0 go build -trimpath -ldflags "$static" -o "$bin/" \
		github.com/containerd/containerd/v2/cmd/{containerd,containerd-shim-runc-v2,ctr} \
		github.com/containernetworking/plugins/plugins/{main/bridge,ipam/host-local} \
		sigs.k8s.io/cri-tools/cmd/crictl github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity
	CGO_ENABLED=0 go build -trimpath -ldflags "$static" -o "$bin/etcd" go.etcd.io/etcd/server/v3
	# Without the tag seccomp no pod starts: "seccomp: config provided but seccomp not supported".
	CGO_ENABLED=1 go build -trimpath -tags 'seccomp netgo osusergo' -ldflags "$static -extldflags -static" -o "$bin/" \
		github.com/opencontainers/runc
}

build_images() {
	CGO_ENABLED=0 go build -trimpath -ldflags "$static" -o "$bin/" \
		github.com/google/go-containerregistry/cmd/crane github.com/fullstorydev/grpcurl/cmd/grpcurl
}

build_helm() {
	CGO_ENABLED=0 go build -trimpath -ldflags "$static" -o "$bin/" helm.sh/helm/v4/cmd/helm
}

# The small ones first, so that what is wrong with the machine shows early.
for module in images helm runtime kubernetes; do
	stamp=$(cat "$here/$module/go.mod" "$here/$module/go.sum" "$0" <(cd "$here/$module" && go version) | sha256sum)
	if [ "$stamp" = "$(cat "$bin/.$module.stamp" 2>/dev/null)" ]; then
		continue
	fi
	echo "cluster: building the programs of tests/cluster/$module (the first build of all four modules takes about ten minutes)"
	start=$SECONDS
	(cd "$here/$module" && "build_$module")
	echo "$stamp" >"$bin/.$module.stamp"
	echo "cluster: built tests/cluster/$module in $((SECONDS - start)) s"
done
