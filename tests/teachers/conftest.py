"""What tests of teachers share: a certificate for remote ones, and real vLLM."""

import datetime
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobs.smollm2_world import make_teacher
from jobs.vllm_server import ROOT, Server, start_server
from jobs.vllm_server import vllm_python as vllm_python_here


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """PEM files of a self-signed certificate for 127.0.0.1, and of its key."""
    folder = tmp_path_factory.mktemp("certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand-in")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter in which vLLM is installed; skips the test where there is none."""
    python = vllm_python_here()
    if python is None:
        pytest.skip("needs vLLM: `make vllm` makes .venv-vllm; RAYFUSE_VLLM_PYTHON names another interpreter")
    return python


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in bfloat16 safetensors with its tokenizer, made once and kept in .cache."""
    folder = ROOT / ".cache" / "smollm2" / "teacher"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        half = folder.with_name(f"teacher.{os.getpid()}")
        make_teacher(half)
        half.rename(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_server(vllm_python: str, smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of SmolLM2 in float32 on a free port of the loopback interface, with an API key."""
    with start_server(vllm_python, smollm2_folder, tmp_path_factory.mktemp("vllm") / "server.log") as server:
        yield server
