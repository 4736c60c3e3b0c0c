//! The host's own certificate: for which names, until when, and whether a new one is due.

use std::collections::BTreeSet;
use std::net::IpAddr;

use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};
use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;

use super::TlsError;

/// How long one is good for.
const LIFE: Duration = Duration::days(90);
/// When it has no more than this left, the next one is made.
const SOON: Duration = Duration::days(30);
/// Clocks differ: it is good a little before it is made.
const SKEW: Duration = Duration::hours(1);

/// What a certificate says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct About {
    pub(super) names: BTreeSet<String>,
    pub(super) not_before: OffsetDateTime,
    pub(super) not_after: OffsetDateTime,
    pub(super) is_ca: bool,
}

impl About {
    /// Nothing if it can't be read.
    pub(super) fn read(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = parse_x509_certificate(certificate).ok()?;
        let names = parsed.subject_alternative_name().ok()?;
        let names = names.iter().flat_map(|names| &names.value.general_names);
        let validity = parsed.validity();
        Some(Self {
            names: names.filter_map(named).collect(),
            not_before: validity.not_before.to_datetime(),
            not_after: validity.not_after.to_datetime(),
            is_ca: parsed.is_ca(),
        })
    }
}

fn named(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let any = four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
            any.ok().map(|ip| ip.to_string())
        }
        _ => None,
    }
}

/// Why a new certificate is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// There is none that can be read.
    None,
    /// The one there is was signed by another authority.
    Foreign,
    /// It is for other names.
    Names,
    /// It ends soon, or has ended.
    Soon,
}

/// Whether a new one is due. `about` is what the present one says, if there is one.
pub(super) fn due(
    about: Option<&About>,
    signed_by_us: bool,
    names: &BTreeSet<String>,
    now: OffsetDateTime,
) -> Option<Due> {
    match about {
        None => Some(Due::None),
        Some(_) if !signed_by_us => Some(Due::Foreign),
        Some(about) if about.names != *names => Some(Due::Names),
        Some(about) if about.not_after - now < SOON => Some(Due::Soon),
        Some(_) => None,
    }
}

/// Makes one. It ends no later than the authority does.
pub(super) fn make(
    issuer: &Issuer<'_, KeyPair>,
    names: &BTreeSet<String>,
    now: OffsetDateTime,
    authority_ends: OffsetDateTime,
) -> Result<(CertificateDer<'static>, KeyPair), TlsError> {
    let failed = |source| TlsError::Made {
        names: names.iter().cloned().collect::<Vec<_>>().join(", "),
        source,
    };
    let key = KeyPair::generate().map_err(failed)?;
    let alternatives: Vec<String> = names.iter().cloned().collect();
    let mut params = CertificateParams::new(alternatives).map_err(failed)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, "Thaw host");
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = now - SKEW;
    params.not_after = (now + LIFE).min(authority_ends);
    let certificate = params.signed_by(&key, issuer).map_err(failed)?;
    Ok((certificate.into(), key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(names: &[&str], days: i64) -> About {
        About {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            not_before: OffsetDateTime::UNIX_EPOCH,
            not_after: OffsetDateTime::UNIX_EPOCH + Duration::days(days),
            is_ca: false,
        }
    }

    #[test]
    fn a_new_one_is_due_for_other_names_or_soon_before_its_end() {
        let wanted = about(&["a", "*.a"], 0).names;
        let now = OffsetDateTime::UNIX_EPOCH;
        let judged = |about: Option<About>, ours| due(about.as_ref(), ours, &wanted, now);
        assert_eq!(judged(None, true), Some(Due::None));
        assert_eq!(judged(Some(about(&["*.a", "a"], 31)), true), None);
        assert_eq!(
            judged(Some(about(&["*.a", "a"], 31)), false),
            Some(Due::Foreign)
        );
        assert_eq!(judged(Some(about(&["a"], 31)), true), Some(Due::Names));
        assert_eq!(
            judged(Some(about(&["*.a", "a"], 29)), true),
            Some(Due::Soon)
        );
        assert_eq!(
            judged(Some(about(&["*.a", "a"], -1)), true),
            Some(Due::Soon)
        );
    }
}
