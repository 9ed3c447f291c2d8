"use strict";
(() => {
  const PER_PAGE = 20;
  const [WITH, WITHOUT, DELTA, WEIGHT] = [0, 1, 2, 3];
  const data = JSON.parse(document.getElementById("data").textContent);
  const images = JSON.parse(document.getElementById("images").textContent);
  const byId = (id) => document.getElementById(id);
  if (!byId("samples")) return;
  const list = byId("list"), reading = byId("reading");
  let page = 0, chosen = [];

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
  const plain = (value) => (value < 0 ? "−" : "") + Math.abs(value).toFixed(2);

  // How strongly a token is tinted, 0 to 1; negative when the image speaks against it.
  const heat = (delta) => {
    if (delta < 0) return Math.max(-1, -0.15 + delta / data.high);
    const span = data.high - data.low;
    return span > 0 ? Math.min(1, Math.max(0, (delta - data.low) / span)) : delta >= data.high ? 1 : 0;
  };
  const tint = (element, strength) => {
    element.style.setProperty("--heat", `${Math.round(Math.abs(strength) * 100)}%`);
    if (strength < 0) element.classList.add("against");
    if (strength >= 1) element.classList.add("full");
  };

  const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : 0);
  const smallest = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const change = (sample) => sample.scores[0][DELTA].reduce((most, delta, i) => Math.max(most, Math.abs(delta - sample.scores[1][DELTA][i])), 0);
  const KEYS = {
    file: null,
    surprise: (sample) => -sample.surprise,
    high: (sample) => -mean(sample.scores[0][DELTA]),
    against: (sample) => smallest(sample.scores[0][DELTA]),
    change: (sample) => -change(sample),
    maps: (sample) => (sample.maps ? 0 : 1),
  };

  const textOf = (sample) => sample.tokens.map((token) => data.vocabulary[token]).join("");
  let haystack = null;
  const choose = () => {
    const wanted = byId("filter").value.trim().toLowerCase();
    chosen = data.samples.map((_, i) => i);
    if (wanted) {
      haystack ??= data.samples.map((sample) => `${sample.id}\n${sample.prompt}\n${textOf(sample)}`.toLowerCase());
      chosen = chosen.filter((i) => haystack[i].includes(wanted));
    }
    const key = KEYS[byId("order").value];
    if (key) {
      const keys = new Map(chosen.map((i) => [i, key(data.samples[i])]));
      chosen.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
    }
    page = 0;
    draw();
  };

  const drawToken = (sample, scores, k) => {
    const text = data.vocabulary[sample.tokens[k]];
    const delta = scores[DELTA][k];
    const token = make("span", "tok", text.replaceAll("\n", "⏎") || "∅");
    if (/^\s*<.*>\s*$/.test(text)) token.classList.add("mark");
    tint(token, heat(delta));
    token.dataset.delta = signed(delta);
    token.setAttribute("role", "option");
    token.tabIndex = k ? -1 : 0;
    token.setAttribute("aria-label", `${text.trim() || "space"}, delta ${signed(delta)}, logit with image ${plain(scores[WITH][k])}, without ${plain(scores[WITHOUT][k])}, weight ${plain(scores[WEIGHT][k])}`);
    return token;
  };

  const drawAnswer = (sample, number, model) => {
    const answer = make("div", "answer");
    answer.setAttribute("role", "listbox");
    answer.setAttribute("aria-orientation", "horizontal");
    answer.setAttribute("aria-label", `label tokens of ${sample.id}${data.names.length > 1 ? `, ${data.names[model]}` : ""}`);
    answer.dir = "auto";
    const gaps = new Set(sample.gaps);
    sample.tokens.forEach((_, k) => {
      if (gaps.has(k)) answer.append(make("span", "gap", "⋯"));
      const token = drawToken(sample, sample.scores[model], k);
      token.dataset.sample = number;
      token.dataset.k = k;
      answer.append(token);
    });
    return answer;
  };

  const drawImage = (sample) => {
    if (sample.image < 0) return make("div", "noimage", "no picture here");
    const image = make("img");
    image.alt = `Image of ${sample.id}`;
    image.src = images[sample.image];
    return image;
  };

  // Maps: one figure per model, its pictures with a canvas over each that has one pixel per image token.
  const strongest = (sample) => {
    const deltas = sample.scores.at(-1)[DELTA];
    const isWord = (k) => /\p{L}{2}/u.test(data.vocabulary[sample.tokens[k]]);
    return deltas.reduce((best, delta, k) => (isWord(k) && (!isWord(best) || delta > deltas[best]) ? k : best), 0);
  };
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
  const tokenText = (sample, k) => data.vocabulary[sample.tokens[k]].replaceAll("\n", "⏎").trim() || "space";

  const drawView = (view, alt) => {
    const frame = make("div", "view");
    const image = make("img");
    image.src = data.pictures[view.picture];
    image.alt = alt;
    frame.append(image);
    frame.style.setProperty("--shape", `${view.columns} / ${view.rows}`);
    frame.style.setProperty("--columns", view.columns);
    return frame;
  };

  const drawNearest = (map, view) => {
    const frame = drawView(view, `${view.name}, dimmed behind the nearest words`);
    const grid = make("div", "words");
    for (const token of view.tokens) {
      const cell = make("span", token >= 0 && map.legible[token] ? "readable" : "", token >= 0 ? data.words[map.words[token]].replaceAll("\n", "⏎").trim() || "␣" : "");
      if (token >= 0) cell.title = `${cell.textContent}, cosine ${plain(map.cosines[token])}`;
      grid.append(cell);
    }
    frame.append(grid);
    return frame;
  };

  const drawMaps = (sample) => {
    const row = make("div", "maps");
    sample.maps.forEach((map, model) => {
      const figure = make("figure", "map");
      const caption = make("figcaption");
      if (data.names.length > 1) caption.append(make("b", "", data.names[model]), " ");
      caption.append(make("span", "looked"));
      const views = make("div", "views");
      for (const view of map.views) {
        const frame = drawView(view, `${view.name}: what the vision tower sees of ${sample.id}`);
        const canvas = make("canvas");
        [canvas.width, canvas.height] = [view.columns, view.rows];
        canvas.setAttribute("role", "img");
        frame.append(canvas);
        if (map.views.length > 1) frame.append(make("span", "name", view.name));
        views.append(frame);
      }
      const nearest = make("details", "nearest");
      nearest.append(make("summary", "", `Nearest words: ${percent(map.readable)} of ${map.words.length.toLocaleString("en")} image tokens readable`));
      nearest.addEventListener("toggle", () => {
        if (nearest.childElementCount === 1) nearest.append(...map.views.map((view) => drawNearest(map, view)));
      });
      figure.append(caption, views, nearest);
      row.append(figure);
    });
    return row;
  };

  const look = (article, sample, k) => {
    article.querySelectorAll(".map").forEach((figure, model) => {
      const map = sample.maps[model], size = map.words.length;
      map.bytes ??= Uint8Array.from(atob(map.attention), (character) => character.charCodeAt(0));
      const text = tokenText(sample, k);
      figure.querySelector(".looked").replaceChildren(make("bdi", "", text), `: ${percent(map.totals[k])} of its attention on the image, ${percent(map.peaks[k])} on the strongest patch`);
      figure.querySelectorAll(".views canvas").forEach((canvas, which) => {
        const view = map.views[which], context = canvas.getContext("2d");
        context.clearRect(0, 0, view.columns, view.rows);
        let best = -1, place = 0;
        view.tokens.forEach((token, cell) => {
          if (token < 0) return;
          const value = map.bytes[k * size + token] / 255;
          if (value > best) [best, place] = [value, cell];
          const x = cell % view.columns, y = Math.floor(cell / view.columns);
          context.fillStyle = `rgb(0 0 0 / ${0.62 * (1 - value)})`;
          context.fillRect(x, y, 1, 1);
          context.fillStyle = `rgb(255 96 0 / ${0.6 * value})`;
          context.fillRect(x, y, 1, 1);
        });
        canvas.setAttribute("aria-label", `attention of ${text}, ${view.name}: strongest in row ${Math.floor(place / view.columns) + 1} of ${view.rows}, column ${(place % view.columns) + 1} of ${view.columns}`);
      });
    });
  };

  const drawSample = (number) => {
    const sample = data.samples[number];
    const article = make("article", "sample");
    article.append(drawImage(sample));
    const side = make("div");
    const id = make("p", "id", `${sample.id} · ${sample.tokens.length} label tokens · surprise `);
    id.append(make("b", "", plain(sample.surprise)));
    side.append(id);
    if (sample.prompt) side.append(make("p", "prompt", sample.prompt));
    data.names.forEach((name, model) => {
      if (data.names.length > 1) side.append(make("p", "name", name));
      side.append(drawAnswer(sample, number, model));
    });
    article.append(side);
    if (sample.maps) {
      article.append(drawMaps(sample));
      look(article, sample, strongest(sample));
    }
    return article;
  };

  const numPages = () => Math.max(1, Math.ceil(chosen.length / PER_PAGE));
  const draw = () => {
    hide();
    list.replaceChildren(...chosen.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(drawSample));
    byId("page").value = page + 1;
    byId("pages").textContent = numPages().toLocaleString("en");
    byId("previous").disabled = page === 0;
    byId("next").disabled = page + 1 >= numPages();
    byId("count").textContent = `${chosen.length.toLocaleString("en")} of ${data.samples.length.toLocaleString("en")} samples`;
  };
  const turn = (to) => {
    page = Math.min(Math.max(0, to), numPages() - 1);
    draw();
    byId("controls").scrollIntoView();
  };

  const ROWS = [["with image", WITH, plain], ["without", WITHOUT, plain], ["delta", DELTA, signed], ["weight", WEIGHT, plain]];
  const show = (token) => {
    const sample = data.samples[token.dataset.sample], k = Number(token.dataset.k);
    const table = make("table");
    if (data.names.length > 1) {
      const head = make("tr");
      head.append(make("th"), ...data.names.map((name) => make("th", "", name)));
      table.append(head);
    }
    for (const [label, which, form] of ROWS) {
      const row = make("tr");
      row.append(make("th", "", label), ...sample.scores.map((scores) => make("td", "", form(scores[which][k]))));
      table.append(row);
    }
    if (sample.maps) look(token.closest(".sample"), sample, k);
    reading.replaceChildren(make("b", "", tokenText(sample, k)), table);
    hide();
    const answers = [...token.closest(".sample").querySelectorAll(".answer")];
    for (const answer of answers) {
      const twin = answer.querySelector(`[data-k="${k}"]`);
      if (twin !== token) twin.classList.add("twin");
    }
    reading.hidden = false;
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const bottom = answers.length > 1 ? Math.max(box.bottom, answers.at(-1).getBoundingClientRect().bottom) : box.bottom;
    const left = Math.min(box.left, document.documentElement.clientWidth - reading.offsetWidth - 8);
    const above = (sample.maps ? answers[0].getBoundingClientRect().top : box.top) - reading.offsetHeight - 6;
    const below = bottom + 8 + reading.offsetHeight < window.innerHeight && !(sample.maps && above > 0); // not over the maps
    reading.style.left = `${Math.max(8, left) + window.scrollX}px`;
    reading.style.top = `${(below ? bottom + 6 : above) + window.scrollY}px`;
  };
  const hide = () => {
    reading.hidden = true;
    for (const twin of list.querySelectorAll(".twin")) twin.classList.remove("twin");
  };

  const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".answer .tok") : null);
  list.addEventListener("mouseover", (event) => { const token = tokenOf(event); token ? show(token) : hide(); });
  list.addEventListener("mouseleave", hide);
  list.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token) show(token); });
  list.addEventListener("focusout", hide);
  list.addEventListener("click", (event) => tokenOf(event)?.focus());
  list.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (event.key === "Escape") hide();
    if (!token) return;
    const all = [...token.parentElement.querySelectorAll(".tok")], k = all.indexOf(token);
    const to = { ArrowRight: k + 1, ArrowDown: k + 1, ArrowLeft: k - 1, ArrowUp: k - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const next = all[Math.min(Math.max(to, 0), all.length - 1)];
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.closest?.("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j") turn(page + 1);
    if (event.key === "k") turn(page - 1);
  });

  let waiting = 0;
  byId("filter").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(choose, 150); });
  byId("order").addEventListener("change", choose);
  byId("numbers").addEventListener("change", (event) => list.classList.toggle("numbered", event.target.checked));
  byId("previous").addEventListener("click", () => turn(page - 1));
  byId("next").addEventListener("click", () => turn(page + 1));
  byId("page").addEventListener("change", (event) => turn((parseInt(event.target.value, 10) || 1) - 1));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  tint(byId("legend-against"), -0.6);
  tint(byId("legend-mid"), 0.5);
  tint(byId("legend-full"), 1);
  choose();
})();
