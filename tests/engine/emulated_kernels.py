"""Kernels for another CPU, which a process in an emulator runs, with the interface of the library.

Arguments of a kernel are pointers to tensors, and structs with such pointers. A call therefore
copies each tensor to an image of the memory, replaces the pointers by addresses in the image, and
copies back what the kernel changed.
"""

import ctypes
import struct
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

DRIVER = Path(__file__).with_suffix(".cpp")
CALL = struct.Struct("64sq8qd")  # `Call` of the driver
NAME = 64
BASE = 1 << 40
ALIGNMENT = 64


class EmulatedLibrary:
    """In place of `build.library()`; from now on, torch records where tensors are.

    Args:
        command: Runs the driver with the library.
    """

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.instructions = self.process.stdout.read(NAME).decode().strip()
        self.storages: dict[int, torch.UntypedStorage] = {}
        data_ptr = torch.Tensor.data_ptr

        def record(tensor: torch.Tensor) -> int:
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage  # also kept alive
            return data_ptr(tensor)

        torch.Tensor.data_ptr = record

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> None:
        image = _Image(self.storages)
        integers, real = [], 0.0
        for argument in arguments:
            if isinstance(argument, ctypes.c_float):
                real = argument.value
            elif isinstance(argument, ctypes.c_void_p):
                integers.append(image.pointer(argument.value))
            elif isinstance(argument, ctypes.c_int64):
                integers.append(argument.value)
            else:  # from `byref`
                integers.append(image.add(bytes(image.moved(argument._obj))))
        integers += [0] * (8 - len(integers))
        content = bytes(image.content)
        header = CALL.pack(name.encode(), len(content), *integers, real)
        self.process.stdin.write(header + content)
        self.process.stdin.flush()
        result = self.process.stdout.read(len(content))
        if len(result) != len(content):
            raise RuntimeError(f"the emulator ended in {name}: {self.process.wait()}")
        image.copy_back(result)


class _Image:
    """The memory of one call."""

    def __init__(self, storages: dict[int, torch.UntypedStorage]) -> None:
        self.storages = storages
        self.content = bytearray(ALIGNMENT)
        self.addresses: dict[int, int] = {}  # in the image, of the storages at these addresses

    def add(self, data: bytes) -> int:
        """The address of a copy of the data."""
        address = BASE + len(self.content)
        self.content += data + bytes(-len(data) % ALIGNMENT)
        return address

    def pointer(self, address: int | None) -> int:
        """The address in the image of what is at this address here."""
        if not address:
            return 0
        for start, storage in self.storages.items():
            if start <= address < start + storage.nbytes():
                break
        else:
            raise ValueError("no tensor has this address")
        if start not in self.addresses:
            self.addresses[start] = self.add(ctypes.string_at(start, storage.nbytes()))
        return self.addresses[start] + address - start

    def moved(self, value: Any) -> Any:
        """A copy of a struct, or of an array of them, with pointers into the image."""
        copy = type(value).from_buffer_copy(value)
        if isinstance(value, ctypes.Array):
            copy[:] = [self.moved(one) for one in value]
            return copy
        for name, kind in value._fields_:
            field = getattr(value, name)
            if kind is ctypes.c_void_p:
                setattr(copy, name, self.pointer(field))
            elif isinstance(field, ctypes.Structure):
                setattr(copy, name, self.moved(field))
            elif name == "loras" and field:
                array = b"".join(bytes(self.moved(field[i])) for i in range(value.num_loras))
                setattr(copy, name, ctypes.cast(self.add(array), kind))
        return copy

    def copy_back(self, result: bytes) -> None:
        """Copy what the kernel changed."""
        for start, address in self.addresses.items():
            part = slice(address - BASE, address - BASE + self.storages[start].nbytes())
            if result[part] != self.content[part]:
                ctypes.memmove(start, result[part], part.stop - part.start)
