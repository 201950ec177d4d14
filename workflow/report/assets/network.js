// A forward pass of a trained network, layer by layer. Maps are {shape, values}, values a Float32Array.

function halfToFloat(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * fraction / 1024;
}

// float16 in base64, little-endian.
function unpack(text) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  return Float32Array.from({length: bytes.length / 2}, (_, i) => halfToFloat(bytes[2 * i] | bytes[2 * i + 1] << 8));
}

function makeNetwork(data) {
  const layers = data.layers.map(layer => layer.weight
    ? {...layer, weight: unpack(layer.weight), bias: unpack(layer.bias)} : layer);
  // bytes (784,), 0 to 255 -> what each layer made of them; the last are the logits
  return bytes => {
    let maps = {kind: "image", shape: [1, 28, 28], values: Float32Array.from(bytes, b => (b - data.mean) / data.deviation)};
    const all = [maps];
    for (const layer of layers) all.push(maps = {kind: layer.kind, ...LAYERS[layer.kind](layer, maps)});
    return all;
  };
}

const LAYERS = {
  conv(layer, {shape: [channels, height, width], values}) {
    const [maps, , rows, columns] = layer.shape, high = height - rows + 1, wide = width - columns + 1;
    const target = new Float32Array(maps * high * wide);
    for (let m = 0; m < maps; m++)
      for (let y = 0; y < high; y++)
        for (let x = 0; x < wide; x++) {
          let sum = layer.bias[m];
          for (let c = 0; c < channels; c++)
            for (let i = 0; i < rows; i++)
              for (let j = 0; j < columns; j++)
                sum += layer.weight[((m * channels + c) * rows + i) * columns + j]
                  * values[(c * height + y + i) * width + x + j];
          target[(m * high + y) * wide + x] = sum;
        }
    return {shape: [maps, high, wide], values: target};
  },
  relu: (_, {shape, values}) => ({shape, values: values.map(value => Math.max(0, value))}),
  max: (layer, maps) => subsample(layer, maps, window => Math.max(...window)),
  mean: (layer, maps) => subsample(layer, maps, window => window.reduce((a, b) => a + b) / window.length),
  dense(layer, {values}) {
    const [units, inputs] = layer.shape;
    const target = Float32Array.from({length: units}, (_, u) => {
      let sum = layer.bias[u];
      for (let i = 0; i < inputs; i++) sum += layer.weight[u * inputs + i] * values[i];
      return sum;
    });
    return {shape: [units], values: target};
  },
};

function subsample({size: [rows, columns]}, {shape: [channels, height, width], values}, reduce) {
  const high = Math.floor(height / rows), wide = Math.floor(width / columns);
  const target = new Float32Array(channels * high * wide);
  for (let c = 0; c < channels; c++)
    for (let y = 0; y < high; y++)
      for (let x = 0; x < wide; x++) {
        const window = [];
        for (let a = 0; a < rows; a++)
          for (let b = 0; b < columns; b++)
            window.push(values[(c * height + y * rows + a) * width + x * columns + b]);
        target[(c * high + y) * wide + x] = reduce(window);
      }
  return {shape: [channels, high, wide], values: target};
}

function softmax(logits) {
  const most = Math.max(...logits), powers = Array.from(logits, value => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map(power => power / sum);
}

function bytesOf(hexadecimal) {
  return Uint8Array.from(hexadecimal.match(/../g) ?? [], pair => parseInt(pair, 16));
}

const page = JSON.parse(document.getElementById("data")?.textContent ?? "{}");
