#!/usr/bin/env python3
"""Reads one build of a store byte by byte, from FORMAT.md alone.

A second reader that shares nothing with the Rust crate: what both accept, and read alike, is
what the specification says. Standard library only.

    reader.py <builds directory> <build id>

Checks the build and the sums and data of every build it takes pages from. Prints one line
`build <id> generation <n> pages <n> page-size <n>`, a line `working-set` with the pages in
first-touch order if there is one, then `<page> <SHA-256 of its content>` for each page. Exits with 1 and a line
on standard error at the first thing that is not as specified.
"""

import hashlib
import json
import os
import re
import struct
import sys

TABLE = []
for value in range(256):
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    TABLE.append(value)

MAX_BYTES = 16 << 40
ZERO_ID = bytes(16)


class Bad(Exception):
    """The build is not what FORMAT.md says."""


def must(condition, what):
    if not condition:
        raise Bad(what)


def crc32c(data, table=tuple(TABLE)):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read(path):
    with open(path, "rb") as file:
        return file.read()


def is_name(name):
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) and name not in (
        "manifest.json",
        "working-set",
    )


def lz4_block(raw):
    """Decodes a block. Source: lz4, doc/lz4_Block_format.md."""
    out, at = bytearray(), 0

    def length(nibble, at):
        if nibble == 15:
            while raw[at] == 255:
                nibble, at = nibble + 255, at + 1
            nibble, at = nibble + raw[at], at + 1
        return nibble, at

    try:
        while True:
            token, at = raw[at], at + 1
            literals, at = length(token >> 4, at)
            out += raw[at : at + literals]
            at += literals
            if at >= len(raw):
                return bytes(out)
            (offset,) = struct.unpack_from("<H", raw, at)
            match, at = length(token & 15, at + 2)
            must(1 <= offset <= len(out), "lz4: offset")
            run = bytes(out[-offset:])
            out += (run * ((match + 4) // offset + 1))[: match + 4]
    except (IndexError, struct.error):
        raise Bad("lz4: length") from None


class Sums:
    """memory.sums of one build."""

    def __init__(self, raw):
        must(len(raw) >= 64, "sums: length")
        magic, version, self.encoding, self.chunk, zero, self.bytes = struct.unpack_from("<8sIIIIQ", raw)
        self.id = raw[32:48]
        zeros, entries_crc, self.crc = struct.unpack_from("<QII", raw, 48)
        must(magic == b"THAWSUM\0", "sums: magic")
        must(version == 1, "sums: unsupported version")
        must(self.encoding in (0, 1), "sums: encoding that this reader doesn't know")
        must(self.crc == masked(raw[:60]), "sums: header checksum")
        must(self.chunk & (self.chunk - 1) == 0 and 4096 <= self.chunk <= 16 << 20, "sums: chunk size")
        must(zero == 0 and zeros == 0, "sums: reserved")
        must(self.bytes <= MAX_BYTES, "sums: data length")
        count = -(-self.bytes // self.chunk)
        must(len(raw) == 64 + (12 if self.encoding else 4) * count, "sums: length")
        must(entries_crc == masked(raw[64:]), "sums: entries checksum")
        self.entries = list(struct.iter_unpack("<III" if self.encoding else "<I", raw[64:]))

    def content(self, data):
        """All pages, from the content of memory.data."""
        chunks, at = [], 0
        for number, entry in enumerate(self.entries):
            length = min(self.chunk, self.bytes - number * self.chunk)
            stored_length, stored_crc, crc = entry if self.encoding else (length, entry[0], entry[0])
            must(1 <= stored_length <= length, "sums: length of chunk %d" % number)
            chunk = data[at : at + stored_length]
            must(crc32c(chunk) == stored_crc, "data: chunk %d" % number)
            if stored_length < length:
                chunk = lz4_block(chunk)
                must(crc32c(chunk) == crc, "data: content of chunk %d" % number)
            must(len(chunk) == length, "data: length of chunk %d" % number)
            chunks.append(chunk)
            at += stored_length
        must(len(data) == at, "data: length")
        return b"".join(chunks)


class Map:
    """memory.map of one build."""

    def __init__(self, raw):
        must(len(raw) >= 128, "map: length")
        fields = struct.unpack_from("<8sIIIIQ16s16sIIQQQI24sI", raw)
        (magic, version, flags, self.page_size, self.generation, self.pages, self.id, parent) = fields[:8]
        (builds, table_crc, table_at, extents, extents_at, extents_crc, zeros, crc) = fields[8:]
        must(magic == b"THAWMAP\0", "map: magic")
        must(version == 1, "map: unsupported version")
        must(crc == masked(raw[:124]), "map: header checksum")
        must(flags == 0, "map: unsupported flags")
        must(zeros == bytes(24), "map: reserved")
        must(self.page_size in (4096, 2097152), "map: page size")
        must(1 <= self.pages <= MAX_BYTES // self.page_size, "map: memory pages")
        must(self.id != ZERO_ID and self.id != parent, "map: ids")
        must((parent == ZERO_ID) == (self.generation == 0), "map: parent")
        self.parent = None if parent == ZERO_ID else parent.hex()
        must(1 <= builds <= 65535, "map: build count")
        must(1 <= extents <= self.pages, "map: extent count")
        must(table_at == 128 and extents_at == 128 + 32 * builds, "map: offsets")
        must(len(raw) == extents_at + 16 * extents, "map: length")
        must(table_crc == masked(raw[table_at:extents_at]), "map: table checksum")
        must(extents_crc == masked(raw[extents_at:]), "map: extents checksum")
        self.header_crc = crc
        self.builds = list(struct.iter_unpack("<16sQII", raw[table_at:extents_at]))
        self.extents = list(struct.iter_unpack("<IIIHH", raw[extents_at:]))
        self.check_builds()
        self.check_extents()

    def check_builds(self):
        ids = [build[0] for build in self.builds]
        must(ZERO_ID not in ids and len(set(ids)) == len(ids), "map: build ids")
        generations = [build[2] for build in self.builds]
        must(all(a < b for a, b in zip(generations, generations[1:])), "map: generations")
        must(ids[-1] == self.id and generations[-1] == self.generation, "map: last build")
        must(all(build[1] <= MAX_BYTES // self.page_size for build in self.builds), "map: data pages")

    def check_extents(self):
        page = 0
        for start, pages, storage, origin, zero in self.extents:
            must(start == page and pages >= 1 and zero == 0, "map: extent")
            must(origin <= len(self.builds), "map: origin")
            if origin == 0:
                must(storage == 0, "map: storage of zeros")
            else:
                must(storage + pages <= self.builds[origin - 1][1], "map: storage")
            page += pages
        must(page == self.pages, "map: coverage")


def read_manifest(raw, build_id):
    must(len(raw) <= 1 << 20, "manifest: length")
    end = b'"\n}\n'
    must(raw.endswith(end) and len(raw) >= 12, "manifest: end")
    must(raw[-12:-4] == b"%08x" % crc32c(raw[:-12]), "manifest: checksum")
    manifest = json.loads(raw.decode("utf-8"))
    members = "format_version build_id parent generation created_at_ms memory vmm labels files checksum"
    must(list(manifest)[-1] == "checksum" and set(manifest) == set(members.split()), "manifest: members")
    must(manifest["format_version"] == 1, "manifest: version")
    must(manifest["build_id"] == build_id, "manifest: build id")
    must(set(manifest["memory"]) == {"page_size", "pages"}, "manifest: memory")
    for texts in (manifest["vmm"], manifest["labels"]):
        must(all(isinstance(text, str) for text in texts.values()), "manifest: strings")
    files = manifest["files"]
    must({"memory.data", "memory.map", "memory.sums"} <= set(files), "manifest: files")
    for name, entry in files.items():
        must(is_name(name), "manifest: file name")
        must(set(entry) == ({"bytes"} if name == "memory.data" else {"bytes", "crc32c"}), "manifest: file")
        must(re.fullmatch("[0-9a-f]{8}", entry.get("crc32c", "00000000")), "manifest: digits")
    return manifest


def check_files(directory, files):
    for name in os.listdir(directory):
        must(name in files or name in ("manifest.json", "working-set"), "file that nobody lists: " + name)
    contents = {name: read(os.path.join(directory, name)) for name in files}
    for name, entry in files.items():
        must(len(contents[name]) == entry["bytes"], "length of " + name)
        if name != "memory.data":
            must("%08x" % crc32c(contents[name]) == entry["crc32c"], "checksum of " + name)
    return contents


def read_working_set(path, memory):
    raw = read(path)
    must(len(raw) >= 64, "working set: length")
    magic, version, flags, size, generation, pages, build, map_crc, runs, runs_crc, crc = struct.unpack_from(
        "<8sIIIIQ16sIIII", raw
    )
    must(magic == b"THAWWSET" and version == 1 and flags == 0, "working set: unknown")
    must(crc == masked(raw[:60]), "working set: header checksum")
    must((size, pages) == (memory.page_size, memory.pages), "working set: stale")
    must((generation, build, map_crc) == (memory.generation, memory.id, memory.header_crc), "working set: stale")
    must(runs <= 65536 and len(raw) == 64 + 8 * runs, "working set: length")
    must(runs_crc == masked(raw[64:]), "working set: runs checksum")
    touched = []
    for start, count in struct.iter_unpack("<II", raw[64:]):
        must(count >= 1 and start + count <= memory.pages, "working set: run")
        touched.extend(range(start, start + count))
    must(len(set(touched)) == len(touched), "working set: page twice")
    return touched


def main(root, build_id):
    must(re.fullmatch("[0-9a-f]{32}", build_id), "build id")
    directory = os.path.join(root, build_id)
    manifest = read_manifest(read(os.path.join(directory, "manifest.json")), build_id)
    contents = check_files(directory, manifest["files"])
    memory = Map(contents["memory.map"])
    must(memory.id.hex() == build_id and memory.parent == manifest["parent"], "manifest and map: ids")
    must(memory.generation == manifest["generation"], "manifest and map: generation")
    shape = {"page_size": memory.page_size, "pages": memory.pages}
    must(shape == manifest["memory"], "manifest and map: memory")

    data = []
    for build, pages, _, crc in memory.builds:
        other = os.path.join(root, build.hex())
        sums = Sums(read(os.path.join(other, "memory.sums")))
        must(sums.id == build and sums.crc == crc, "other data than the map's: " + build.hex())
        must(sums.bytes == pages * memory.page_size, "other length than the map's: " + build.hex())
        data.append(sums.content(read(os.path.join(other, "memory.data"))))

    touched = None
    path = os.path.join(directory, "working-set")
    if os.path.exists(path):
        touched = read_working_set(path, memory)
    size = memory.page_size
    print("build %s generation %d pages %d page-size %d" % (build_id, memory.generation, memory.pages, size))
    if touched is not None:
        print("working-set", *touched)
    zero = hashlib.sha256(bytes(size)).hexdigest()
    for start, pages, storage, origin, _ in memory.extents:
        for page in range(pages):
            at = (storage + page) * size
            content = zero if origin == 0 else hashlib.sha256(data[origin - 1][at : at + size]).hexdigest()
            print(start + page, content)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (Bad, OSError, ValueError) as error:
        sys.exit("reader.py: %s" % error)
