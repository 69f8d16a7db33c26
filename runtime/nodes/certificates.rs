//! A private authority, and certificates that it signs.

use std::io::Write as _;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

use crate::error::{At, Error, Result};

/// Makes a directory with an authority (`authority.pem`), a certificate of the coordinator for its `hosts` (`coordinator.pem`) and one
/// for nodes (`node.pem`), each with its key (`*.key`, readable by their owner alone). They are valid until 4096.
///
/// # Errors
///
/// [`Error::Usage`] if there is an authority already or a host is no name, [`Error::Io`] if a file cannot be written.
pub fn make_certificates(directory: &Path, hosts: &[String]) -> Result<()> {
    let authority_file = directory.join("authority.pem");
    if authority_file.exists() {
        let message = format!(
            "{} is there already, and its certificates with it; name another directory",
            authority_file.display()
        );
        return Err(Error::Usage(message));
    }
    std::fs::create_dir_all(directory).at(directory)?;
    let failed = |e: rcgen::Error| Error::Usage(format!("a certificate cannot be made: {e}"));
    let named = |name: &str| {
        let mut distinguished = DistinguishedName::new();
        distinguished.push(DnType::CommonName, name);
        distinguished
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = named("rehearsal authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().map_err(failed)?).map_err(failed)?;
    write(&authority_file, &authority.pem(), false)?;
    write(&directory.join("authority.key"), &authority.key().serialize_pem(), true)?;
    let mut names: Vec<String> = hosts.to_vec();
    names.extend(["localhost", "127.0.0.1", "::1"].map(String::from));
    for (file, names, purpose) in [
        ("coordinator", names, ExtendedKeyUsagePurpose::ServerAuth),
        ("node", Vec::new(), ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = CertificateParams::new(names).map_err(failed)?;
        params.distinguished_name = named(&format!("rehearsal {file}"));
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &authority).map_err(failed)?;
        write(&directory.join(format!("{file}.pem")), &certificate.pem(), false)?;
        write(&directory.join(format!("{file}.key")), &key.serialize_pem(), true)?;
    }
    Ok(())
}

/// Writes a file that does not exist; a secret one is readable by its owner alone.
fn write(path: &Path, text: &str, secret: bool) -> Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if secret {
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    #[cfg(not(unix))]
    let _ = secret;
    options.open(path).and_then(|mut file| file.write_all(text.as_bytes())).at(path)
}
