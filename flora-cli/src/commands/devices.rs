//! `flora devices`: what batches can run on here.

use clap::Args;
use flora::prelude::*;

use super::error::CommandError;
use super::output;

/// List the devices of this machine
#[derive(Args)]
pub(crate) struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn devices(arguments: &Arguments) -> Result<(), CommandError> {
    let devices = devices::list();
    if arguments.json {
        return output::print_json(&devices);
    }
    let columns = ["<id", "<name", "<driver", ">plane", ">shared memory", ">largest buffer", "<types", "<fragments"];
    let mut table = output::table(&columns);
    for device in &devices {
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        let fragments = match &device.fragments[..] {
            [] => "-".to_owned(),
            [first] => first.clone(),
            [first, rest @ ..] => format!("{first}, {} more", rest.len()),
        };
        let software = if device.software { " (software)" } else { "" };
        table.add_row([
            device.id.clone(),
            format!("{}{software}", device.name),
            device.driver.clone(),
            or_dash(device.plane_size.map(|size| size.to_string())),
            or_dash(device.shared_memory_bytes.map(|bytes| output::bytes(bytes as u64))),
            or_dash(device.largest_buffer_bytes.map(output::bytes)),
            device.element_types.join(", "),
            fragments,
        ]);
    }
    output::print(&output::lines(&table))?;
    for devices::Unsupported { name, feature } in devices::unsupported() {
        output::note(&format!("{name} is here, and this flora has no code for it: build it with --features {feature}"));
    }
    Ok(())
}
