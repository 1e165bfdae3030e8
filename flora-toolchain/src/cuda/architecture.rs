//! The generations of NVIDIA GPUs that kernels are compiled for.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A generation of NVIDIA GPUs that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Architecture {
    /// Ampere (A100): compute capability 8.0.
    #[serde(rename = "sm_80")]
    Sm80,
    /// Hopper (H100, H200): compute capability 9.0 with the features of that generation alone, as a launch there uses.
    #[serde(rename = "sm_90a")]
    Sm90a,
    /// Blackwell (B100, B200): compute capability 10.0.
    #[serde(rename = "sm_100")]
    Sm100,
}

/// A name that is none of [`Architecture`]'s.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown architecture `{0}`: use sm_80, sm_90 (or sm_90a) or sm_100")]
pub struct UnknownArchitecture(
    /// The name.
    pub String,
);

impl Architecture {
    /// Every architecture, oldest first.
    pub const ALL: [Self; 3] = [Self::Sm80, Self::Sm90a, Self::Sm100];

    /// The number and features after `sm_` and `compute_`.
    pub(super) fn number(self) -> &'static str {
        match self {
            Self::Sm80 => "80",
            Self::Sm90a => "90a",
            Self::Sm100 => "100",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sm_{}", self.number())
    }
}

impl FromStr for Architecture {
    type Err = UnknownArchitecture;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "sm_80" => Ok(Self::Sm80),
            "sm_90" | "sm_90a" => Ok(Self::Sm90a),
            "sm_100" => Ok(Self::Sm100),
            _ => Err(UnknownArchitecture(name.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_parse_back_and_serialise_as_printed() {
        for architecture in Architecture::ALL {
            assert_eq!(architecture.to_string().parse(), Ok(architecture));
            assert_eq!(serde_json::to_string(&architecture).unwrap(), format!("\"{architecture}\""));
        }
        assert_eq!("sm_90".parse(), Ok(Architecture::Sm90a));
        assert!("sm_75".parse::<Architecture>().unwrap_err().to_string().contains("sm_80"));
    }
}
