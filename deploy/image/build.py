"""Writes the agent's container image as an OCI archive, without a container runtime or a network.

    build.py BINARY ARCHIVE VERSION

The image holds the binary, the program that mounts through FUSE, the libraries that `ldd` names for them, what NVIDIA's library needs of the C
library when it is loaded at run time, and CA certificates; all from this machine, which should be
Debian or Ubuntu. No shell, no package manager.

The same input gives the same bytes: entries are sorted, owned by root, and as old as SOURCE_DATE_EPOCH
(0 where it is not set) says.
"""

import gzip
import hashlib
import io
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tarfile

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
# As on Debian; where it is, NVIDIA's container runtime puts its libraries.
LIBRARIES = f"usr/lib/{platform.machine()}-linux-gnu"
# libnvidia-ml.so.1 names them, and the binary does not.
FOR_NVML = ["libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1"]
# The name in deploy/daemonset, so that an import into containerd is found under it.
NAME = "registry.example/carport/carport"
TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/\n",
    "etc/group": "root:x:0:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    # NVIDIA's runtime asks it where libraries go, and writes a cache by the second one.
    "etc/debian_version": "12\n",
    "etc/ld.so.conf": f"/{LIBRARIES}\n/usr/lib64\n",
}
FOLDERS = ["dev", "etc", "proc", "root", "run", "sys", "tmp", "var/lib"]


def libraries(binary):
    """Where the loader finds each library of `binary`, by name; and the loader itself."""
    listed = subprocess.run(["ldd", binary], check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"^\s*(\S+) => (/\S+) \(", listed, re.MULTILINE))
    (loader,) = re.findall(r"^\s*(/\S+) \(", listed, re.MULTILINE)
    beside = pathlib.Path(found["libc.so.6"]).parent
    for name in FOR_NVML:
        found.setdefault(name, str(beside / name))
    return found, loader


def content(binary):
    """All files of the image: path -> (bytes, mode)."""
    found, loader = libraries(binary)
    helper = shutil.which("fusermount3")
    if not helper:
        sys.exit("fusermount3: not found; install the package fuse3")
    found.update(libraries(helper)[0])
    files = {"usr/bin/carport": (binary, 0o755), CERTIFICATES: ("/" + CERTIFICATES, 0o644)}
    # Mounts streaming volumes; root runs it.
    files["usr/bin/fusermount3"] = (helper, 0o755)
    files[loader.lstrip("/")] = (loader, 0o755)
    for name, path in found.items():
        files[f"{LIBRARIES}/{name}"] = (path, 0o644)
    for package in ["libc6", "libgcc-s1", "ca-certificates", "fuse3"]:
        path = f"usr/share/doc/{package}/copyright"
        if os.path.exists("/" + path):
            files[path] = ("/" + path, 0o644)
    license = pathlib.Path(__file__).parent.parent.parent / "LICENSE"
    files["usr/share/doc/carport/LICENSE"] = (license, 0o644)
    read = {path: (pathlib.Path(source).read_bytes(), mode) for path, (source, mode) in files.items()}
    read.update({path: (text.encode(), 0o644) for path, text in TEXTS.items()})
    return read


def archive(entries, links, time):
    """A tar of `entries`, whose folders are made as they are needed."""
    folders = {
        str(parent)
        for path in [*entries, *links]
        for parent in pathlib.PurePosixPath(path).parents
        if str(parent) != "."
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted({*folders, *entries, *links}):
            entry = tarfile.TarInfo(path)
            entry.mtime = time
            if path in links:
                entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, links[path], 0o777
                tar.addfile(entry)
            elif path in entries and entries[path] is not None:
                data, entry.mode = entries[path]
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            else:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if path == "tmp" else 0o755
                tar.addfile(entry)
    return buffer.getvalue()


def main():
    binary, output, version = sys.argv[1:]
    time = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    created = subprocess.run(
        ["date", "-u", "-d", f"@{time}", "+%Y-%m-%dT%H:%M:%SZ"], check=True, capture_output=True, text=True
    ).stdout.strip()
    files = content(binary)
    # One folder for programs and libraries, as distributions have it; the loader's path is fixed.
    links, moved = {"lib": "usr/lib"}, {}
    for path, value in files.items():
        top = path.split("/")[0]
        if top in ("lib", "lib64"):
            links[top] = f"usr/{top}"
            path = f"usr/{path}"
        moved[path] = value
    moved.update({folder: None for folder in FOLDERS})
    layer = archive(moved, links, time)
    packed = gzip.compress(layer, compresslevel=6, mtime=0)

    blobs = {}

    def blob(data, media_type):
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = (data, 0o644)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def document(value, media_type):
        return blob(json.dumps(value, sort_keys=True).encode(), media_type)

    oci = "application/vnd.oci.image"
    labels = {
        "org.opencontainers.image.title": "carport",
        "org.opencontainers.image.description": "One copy of each model on the node, mounted into every pod",
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.licenses": "Apache-2.0",
    }
    config = {
        "architecture": MACHINES[platform.machine()],
        "os": "linux",
        "created": created,
        "config": {"Cmd": ["carport", "agent"], "Env": ["PATH=/usr/bin"], "Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
        "history": [{"created": created, "created_by": "deploy/image/build.py"}],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{oci}.manifest.v1+json",
        "config": document(config, f"{oci}.config.v1+json"),
        "layers": [blob(packed, f"{oci}.layer.v1.tar+gzip")],
    }
    top = document(manifest, f"{oci}.manifest.v1+json")
    named = {
        "org.opencontainers.image.ref.name": version,
        "io.containerd.image.name": f"{NAME}:{version}",
    }
    index = {"schemaVersion": 2, "mediaType": f"{oci}.index.v1+json"}
    index["manifests"] = [top | {"annotations": named}]
    blobs["index.json"] = (json.dumps(index, sort_keys=True).encode(), 0o644)
    blobs["oci-layout"] = (b'{"imageLayoutVersion": "1.0.0"}', 0o644)
    pathlib.Path(output).write_bytes(archive(blobs, {}, time))
    print(f"{output}: {top['digest']}, {len(packed) / 1e6:.1f} MB to pull, {len(layer) / 1e6:.1f} MB unpacked")


main()
