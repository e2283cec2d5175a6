import { api } from "../../../scripts/api.js";

const TEXT_HEIGHT = 44; // pixels: two lines and the space around them
const MEDIA_HEIGHT = 220;

function element(tag, style) {
  const made = document.createElement(tag);
  made.style.cssText = style;
  return made;
}

function source({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

// A video, or where the browser cannot play it (ProRes, ffv1, often H.265) its name.
function player(output) {
  const video = element("video", "width: 100%; height: 100%; min-height: 0; object-fit: contain");
  Object.assign(video, { controls: true, loop: true, playsInline: true, src: source(output) });
  video.addEventListener("error", () => {
    const note = element("div", "align-self: center; padding: 8px; text-align: center; font-size: 12px; overflow-wrap: anywhere");
    note.textContent = `${output.filename} is in the output folder; this browser does not play it`;
    video.replaceWith(note);
  });
  return video;
}

// What a node says, and below it the picture of what it makes or the videos that it made.
export class Screen {
  constructor(onResize) {
    this.onResize = onResize;
    this.element = element("div", "display: flex; flex-direction: column; gap: 4px; width: 100%; box-sizing: border-box; overflow: hidden");
    this.element.className = "wan-video";
    this.text = element("div", "white-space: pre-line; font-size: 12px; line-height: 1.4; padding: 0 8px; flex: none; max-height: 102px; overflow: auto; overflow-wrap: anywhere");
    this.text.setAttribute("role", "status");
    this.picture = element("img", "width: 100%; flex: 1 1 0; min-height: 0; object-fit: contain");
    this.picture.alt = "What the video is going to be";
    this.players = element("div", "display: grid; gap: 4px; flex: 1 1 0; min-height: 0; overflow: auto; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); grid-auto-rows: minmax(120px, 1fr)");
    this.element.append(this.text, this.picture, this.players);
    this.videos = [];
    this.show({});
  }

  // Any of: text; picture, a JPEG in base64; videos, as outputs name them; ended, when there is nothing to come.
  show({ text, picture, videos, ended }) {
    if (text !== undefined) this.text.textContent = text;
    if (picture) this.picture.src = `data:image/jpeg;base64,${picture}`;
    if (ended || videos) this.picture.removeAttribute("src");
    if (videos) this.play(videos);
    this.arrange();
  }

  play(outputs) {
    const addresses = outputs.map(source);
    // Of the page and of the pack comes the same news: a player that plays is left alone.
    if (addresses.join() === this.videos.join()) return;
    this.videos = addresses;
    this.players.replaceChildren(...outputs.map(player));
  }

  arrange() {
    const drawn = this.picture.hasAttribute("src"), spoken = this.text.textContent !== "";
    // Instead of the videos of the run before, which are there again if this one fails.
    this.picture.style.display = drawn ? "" : "none";
    this.players.style.display = drawn || !this.videos.length ? "none" : "grid";
    this.text.style.display = spoken ? "" : "none";
    const height = (spoken ? TEXT_HEIGHT : 0) + (drawn || this.videos.length ? MEDIA_HEIGHT : 0);
    if (height === this.minHeight) return;
    this.minHeight = height;
    // By this one Nodes 2.0 goes, the canvas by the widget's own.
    this.element.style.minHeight = `${height}px`;
    this.onResize();
  }
}
