//! `--rlimit RESOURCE=SOFT[:HARD]`: how much of something a command may use.

use microsandbox::Resource;
use serde_json::Value;

/// A limit as it was typed; `u64::MAX` is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) resource: Resource,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// Reads a limit.
pub(super) fn limit(text: &str) -> Result<Limit, String> {
    let form = || "write it as RESOURCE=SOFT[:HARD], such as nofile=1024:4096".to_owned();
    let (name, values) = text.split_once('=').ok_or_else(form)?;
    // The names are those of the protocol, and the error lists them.
    let name = name.to_ascii_lowercase();
    let name = name.strip_prefix("rlimit_").unwrap_or(&name);
    let resource = serde_json::from_value(Value::from(name)).map_err(|error| error.to_string())?;
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let value = |text: &str| match text {
        "unlimited" => Ok(u64::MAX),
        number => number.parse().map_err(|_| form()),
    };
    let (soft, hard) = (value(soft)?, value(hard)?);
    if soft > hard {
        return Err(format!(
            "{soft} is more than {hard}, up to which it may be raised"
        ));
    }
    Ok(Limit {
        resource,
        soft,
        hard,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_ulimit_and_others_write_them() {
        for (text, resource, soft, hard) in [
            ("nofile=64", Resource::Nofile, 64, 64),
            ("NPROC=5:9", Resource::Nproc, 5, 9),
            ("RLIMIT_AS=1:unlimited", Resource::As, 1, u64::MAX),
            ("core=unlimited", Resource::Core, u64::MAX, u64::MAX),
        ] {
            let wanted = Limit {
                resource,
                soft,
                hard,
            };
            assert_eq!(limit(text), Ok(wanted), "{text}");
        }
        for text in [
            "",
            "nofile",
            "nofile=",
            "nofile=-1",
            "nofile=5:4",
            "files=5",
            "cpu=1:2:3",
        ] {
            assert!(limit(text).is_err(), "{text}");
        }
        assert!(limit("files=5").unwrap_err().contains("`nofile`"));
    }
}
