// A relay with two outputs, as the LoRa Alliance's payload codec API (TS013) has it. One byte: bit 0 and bit 1.

function decodeUplink(input) {
  if (input.bytes.length !== 1) return { errors: ['a message has one byte'] };
  return { data: { fan: input.bytes[0] & 1, light: (input.bytes[0] >> 1) & 1 } };
}

function encodeDownlink(input) {
  var fan = input.data.fan, light = input.data.light === undefined ? 0 : input.data.light;
  if ((fan !== 0 && fan !== 1) || (light !== 0 && light !== 1)) return { errors: ['fan and light are 0 or 1'] };
  return { bytes: [fan | (light << 1)], fPort: 10 };
}

function decodeDownlink(input) {
  return { data: { fan: input.bytes[0] & 1, light: (input.bytes[0] >> 1) & 1 } };
}
