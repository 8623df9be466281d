#!/bin/sh
# Makes a machine of its own out of new namespaces, and keeps it until it is killed. Started by `carport-cluster`
# as root, by `unshare -m -n -u -i -C`, in the cluster's own cgroups. tests/src/cluster/machine.rs has the other half.
#
#   node.sh STATE BIND...     STATE: the cluster's folder; BIND: folders that are seen inside as outside
#
# In the environment: CGROUPS, the cgroup v1 hierarchies ("cpu,cpuacct memory name=systemd"), or "v2".
set -eu

state=$1
shift
mount --make-rprivate /

# Root: this machine's root below a writable layer in memory. Otherwise container runtime and kubelet write to
# /opt/containerd, /var/lib/cni and /usr/libexec/kubernetes of the machine that runs the tests.
mkdir -p "$state/root"
mount -t tmpfs -o mode=755 carport-cluster "$state/root"
mkdir "$state/root/upper" "$state/root/work" "$state/root/new"
new=$state/root/new
mount -t overlay -o "lowerdir=/,upperdir=$state/root/upper,workdir=$state/root/work" carport-cluster "$new"
mount --rbind /dev "$new/dev"
mount -t proc proc "$new/proc"
mount -t sysfs sysfs "$new/sys"
for folder in "$@" "$state"; do
	mkdir -p "$new$folder"
	mount --bind "$folder" "$new$folder"
done

# cgroups: with the cgroup namespace, our own are the roots of what is mounted here.
if [ "$CGROUPS" = v2 ]; then
	mount -t cgroup2 cgroup2 "$new/sys/fs/cgroup"
	# A cgroup with processes cannot hand controllers to its children: the processes of the node get one of their own.
	mkdir -p "$new/sys/fs/cgroup/node"
	echo $$ >"$new/sys/fs/cgroup/node/cgroup.procs"
else
	mount -t tmpfs -o mode=755 cgroup "$new/sys/fs/cgroup"
	for hierarchy in $CGROUPS; do
		mkdir "$new/sys/fs/cgroup/${hierarchy#name=}"
		case $hierarchy in
		name=*) options=none,$hierarchy ;;
		*) options=$hierarchy ;;
		esac
		mount -t cgroup -o "$options" cgroup "$new/sys/fs/cgroup/${hierarchy#name=}"
	done
fi

# What is kept in files lies in STATE, on a real file system: hard links, and overlay mounts over it.
mount -t tmpfs -o mode=755 run "$new/run"
for folder in lib/kubelet lib/containerd lib/carport log; do
	mkdir -p "$state/node/$folder" "$new/var/$folder"
	mount --bind "$state/node/$folder" "$new/var/$folder"
done

# Names: only those of this file; without a server, so that other look-ups fail at once instead of timing out.
rm -rf "$new/etc/hosts" "$new/etc/resolv.conf" "$new/etc/cni" "$new/etc/containerd"
cp "$state/hosts" "$new/etc/hosts"
cp "$state/resolv.conf" "$new/etc/resolv.conf"
mkdir -p "$new/etc/cni/net.d"
cp "$state/cni.conflist" "$new/etc/cni/net.d/10.conflist"
mkdir -p "$new/etc/containerd"
cp -r "$state/certs.d" "$new/etc/containerd/certs.d"

# The kubelet sets three values for the whole machine, and ends where it cannot: it gets files with these values.
mkdir "$new/run/sys"
for value in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
	file=$(echo "${value%=*}" | tr / .)
	echo "${value#*=}" >"$new/run/sys/$file"
	mount --bind "$new/run/sys/$file" "$new/proc/sys/${value%=*}"
done
# The kernel allows a new proc mount in a user namespace only where an untouched one is visible.
mkdir "$new/run/clean-proc"
mount -t proc proc "$new/run/clean-proc"

cd "$new"
mkdir -p .old
pivot_root . .old
umount -l /.old
rmdir /.old
# Last: the kubelet refuses to work below mounts that are not shared.
mount --make-rshared /

# Network: a pair of our own, nothing leads out. There is no kube-proxy: the API server listens at the address of
# the Service `kubernetes` itself; other Services do not work.
hostname "$NODE"
ip link set lo up
ip link add node0 type veth peer name node1
ip addr add 10.88.0.1/24 dev node0
ip link set node0 up
ip link set node1 up
ip route add default dev node0
ip addr add 10.96.0.1/32 dev lo

touch "$state/ready"
exec sleep infinity
