//! From a typed line to the arguments it stands for.

/// Takes the next word off a line: up to a blank, or in quotes.
fn take_word(line: &mut &[u8]) -> Result<Option<Vec<u8>>, String> {
    *line = line.trim_ascii_start();
    let Some(quoted) = line.strip_prefix(b"\"") else {
        let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
        let (word, rest) = line.split_at(end);
        *line = rest;
        return Ok((end > 0).then(|| word.to_vec()));
    };
    let mut word = vec![];
    let mut bytes = quoted.iter().copied();
    loop {
        let byte = bytes.next().ok_or("a quote is opened and not closed")?;
        word.push(match byte {
            b'"' => break,
            b'\\' => match bytes.next() {
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(escaped @ (b'"' | b'\'' | b'\\')) => escaped,
                Some(b'x') => {
                    let mut digit = || (bytes.next()? as char).to_digit(16);
                    let (high, low) = digit().zip(digit()).ok_or("two hexadecimal digits follow \\x")?;
                    (high << 4 | low) as u8
                }
                _ => return Err("an escape is one of \\n \\r \\t \\\" \\' \\\\ \\xNN".to_owned()),
            },
            byte => byte,
        });
    }
    *line = &quoted[quoted.len() - bytes.len()..];
    if line.first().is_some_and(|next| !next.is_ascii_whitespace()) {
        return Err("a blank must follow the closing quote; inside quotes write \\\"".to_owned());
    }
    Ok(Some(word))
}

/// Takes options off a line; the word behind them, if there is one.
fn take_options(line: &mut &[u8], options: &mut Vec<Vec<u8>>) -> Result<Option<Vec<u8>>, String> {
    while let Some(word) = take_word(line)? {
        match word.as_slice() {
            b"--" => return take_word(line),
            b"--ttl" | b"--flags" => {
                options.push(word);
                options.extend(take_word(line)?);
            }
            [b'-', ..] => options.push(word),
            _ => return Ok(Some(word)),
        }
    }
    Ok(None)
}

/// The arguments that a line stands for.
pub(crate) fn split_line(line: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let mut line = line.trim_ascii();
    let mut words = vec![];
    words.extend(take_word(&mut line)?);
    if words != [b"set"] {
        while let Some(word) = take_word(&mut line)? {
            words.push(word);
        }
        return Ok(words);
    }
    let key = take_options(&mut line, &mut words)?;
    line = line.trim_ascii_start();
    let mut value = (!line.is_empty()).then(|| line.to_vec());
    if line.starts_with(b"\"") {
        value = take_word(&mut line)?;
        if take_options(&mut line, &mut words)?.is_some() {
            return Err("only options may follow a value in quotes; inside quotes write \\\"".to_owned());
        }
    }
    // Whatever the value looks like, it is no option.
    words.push(b"--".to_vec());
    words.extend(key.into_iter().chain(value));
    Ok(words)
}
