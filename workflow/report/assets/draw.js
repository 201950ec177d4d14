// Draw a digit: the page's own network recognises it, and shows what each of its layers makes of it.
const drawing = document.getElementById("draw");
if (drawing && page.network?.layers) {
  const forward = makeNetwork(page.network), paper = document.getElementById("paper");
  const context = paper.getContext("2d", {willReadFrequently: true});
  const answer = document.getElementById("answer"), sample = document.getElementById("sample");

  const wipe = () => { context.fillStyle = "#fff"; context.fillRect(0, 0, paper.width, paper.height); };
  const empty = () => { wipe(); answer.textContent = "Nothing drawn yet."; document.getElementById("layers").replaceChildren(); };

  // As MNIST's digits were made: fitted into 20x20 pixels, and moved so that the centre of mass is in the middle.
  function toImage() {
    const side = paper.width, pixels = context.getImageData(0, 0, side, side).data;
    let top = side, bottom = -1, left = side, right = -1;
    for (let y = 0; y < side; y++)
      for (let x = 0; x < side; x++)
        if (pixels[4 * (y * side + x)] < 200) {
          top = Math.min(top, y); bottom = Math.max(bottom, y);
          left = Math.min(left, x); right = Math.max(right, x);
        }
    if (bottom < 0) return null;
    const scale = 20 / Math.max(bottom - top + 1, right - left + 1);
    const small = document.createElement("canvas");
    small.width = small.height = 28;
    const on = small.getContext("2d", {willReadFrequently: true});
    const place = (x, y) => {
      on.fillStyle = "#fff";
      on.fillRect(0, 0, 28, 28);
      on.imageSmoothingQuality = "high";
      const wide = (right - left + 1) * scale, high = (bottom - top + 1) * scale;
      on.drawImage(paper, left, top, right - left + 1, bottom - top + 1, x, y, wide, high);
      return Uint8Array.from({length: 784}, (_, i) => 255 - on.getImageData(i % 28, i / 28 | 0, 1, 1).data[0]);
    };
    const first = place(4, 4);
    let mass = 0, across = 0, down = 0;
    first.forEach((value, i) => { mass += value; across += value * (i % 28); down += value * (i / 28 | 0); });
    return place(4 + Math.round(13.5 - across / mass), 4 + Math.round(13.5 - down / mass));
  }

  function recognise(bytes) {
    const all = forward(bytes), chances = softmax(all.at(-1).values);
    const best = chances.indexOf(Math.max(...chances));
    answer.textContent = `This looks like a ${best} (${(100 * chances[best]).toFixed(0)} %).`;
    answer.dataset.digit = best;
    showLayers(all, chances);
    return all;
  }

  function showLayers(all, chances) {
    const names = {image: "the image as the network sees it", conv: "convolution", relu: "after relu",
      max: "largest of each window", mean: "mean of each window", dense: "dense layer"};
    const shown = document.getElementById("layers");
    shown.replaceChildren();
    for (const maps of all.slice(0, -1)) {
      const [count, high, wide] = maps.shape.length === 3 ? maps.shape : [1, 1, maps.shape[0]];
      const row = document.createElement("div"), title = document.createElement("div"), places = document.createElement("div");
      row.className = "layer"; places.className = "maps"; title.className = "small";
      title.textContent = `${names[maps.kind]}: ${maps.shape.length === 3 ? `${count} of ${high}x${wide}` : `${wide} units`}`;
      const most = Math.max(1e-6, ...Array.from(maps.values, Math.abs));
      for (let m = 0; m < count; m++) places.append(mapOf(maps.values.subarray(m * high * wide, (m + 1) * high * wide), high, wide, most));
      row.append(title, places);
      shown.append(row);
    }
    const list = document.createElement("div");
    list.className = "chances";
    chances.forEach((chance, digit) => {
      const name = document.createElement("span"), bar = document.createElement("span"), text = document.createElement("span");
      const inner = document.createElement("span");
      name.textContent = digit; bar.className = "bar"; text.textContent = `${(100 * chance).toFixed(1)} %`;
      inner.style.cssText = `width:${100 * chance}%;background:#0550ae`;
      bar.append(inner);
      list.append(name, bar, text);
    });
    shown.append(list);
  }

  // Dark for large values, blue for negative ones.
  function mapOf(values, high, wide, most) {
    const canvas = document.createElement("canvas"), image = new ImageData(wide, high);
    canvas.width = wide; canvas.height = high;
    const scale = high === 1 ? Math.max(1, Math.min(5, 420 / wide)) : Math.max(2, Math.round(48 / wide));
    canvas.style.width = `${wide * scale}px`;
    canvas.style.height = `${high === 1 ? 14 : high * scale}px`;
    canvas.style.maxWidth = "100%";
    values.forEach((value, i) => {
      const depth = Math.round(255 * Math.min(1, Math.abs(value) / most));
      image.data.set(value < 0 ? [255 - depth, 255 - depth / 2, 255, 255] : [255 - depth, 255 - depth, 255 - depth, 255], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  let last = null;
  const at = event => {
    const box = paper.getBoundingClientRect();
    return [(event.clientX - box.left) * paper.width / box.width, (event.clientY - box.top) * paper.height / box.height];
  };
  const stroke = (from, to) => {
    context.strokeStyle = "#000"; context.lineWidth = 22; context.lineCap = context.lineJoin = "round";
    context.beginPath(); context.moveTo(...from); context.lineTo(...to); context.stroke();
  };
  paper.addEventListener("pointerdown", event => { if (sample.value !== "") { sample.value = ""; wipe(); } last = at(event); stroke(last, last); event.preventDefault(); });
  paper.addEventListener("pointermove", event => { if (last) { const to = at(event); stroke(last, to); last = to; } });
  addEventListener("pointerup", () => {
    if (!last) return;
    last = null;
    sample.value = "";
    const bytes = toImage();
    if (bytes) recognise(bytes);
  });
  document.getElementById("wipe").addEventListener("click", empty);

  (page.recognition?.digits ?? []).forEach((digit, i) => {
    const option = document.createElement("option");
    option.value = i;
    option.textContent = `a ${digit.label}${digit.hard ? ", hard" : ""}`;
    sample.append(option);
  });
  sample.addEventListener("change", () => {
    if (sample.value === "") return empty();
    const bytes = bytesOf(page.recognition.digits[sample.value].pixels), image = new ImageData(28, 28);
    bytes.forEach((byte, i) => image.data.set([255 - byte, 255 - byte, 255 - byte, 255], 4 * i));
    const small = document.createElement("canvas");
    small.width = small.height = 28;
    small.getContext("2d").putImageData(image, 0, 0);
    wipe();
    context.drawImage(small, 0, 0, paper.width, paper.height);
    recognise(bytes);
  });
  empty();
  // what there is to see is seen at once: a digit that is not hard
  const first = (page.recognition?.digits ?? []).findIndex(digit => !digit.hard);
  if (first >= 0) {
    sample.value = first;
    sample.dispatchEvent(new Event("change"));
  }
}
